"""The figures by which two trainers are compared, and their table.

Owns their definitions, the same for both sides. Invariant: seconds until a goal count from the first step's start and
leave out the time between steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.against_trl.cpu_sampler import CpuSampler

TARGET = 0.9
REWARD_WINDOW_STEPS = 5
NUM_COLD_STEPS = 5  # caches, allocator and the first evaluation settle in these
PENSTOCK_PHASES = ("wait", "commit", "pack", "forward_backward", "optimizer", "push_wait")


@dataclass(frozen=True)
class Step:
    """One step's start and end in Unix seconds; phases in seconds."""

    started_at: float
    ended_at: float
    reward_mean: float
    phases: dict[str, float]
    cpu_phases: dict[str, float]

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


@dataclass(frozen=True)
class Side:
    """One trainer's run. evals: (steps that the evaluated weights were trained for, accuracy)."""

    name: str
    steps: tuple[Step, ...]
    evals: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Figures:
    """None: not reached."""

    name: str
    num_steps: int
    seconds_per_step: float
    cpu_seconds_per_step: float
    seconds_to_heldout: float | None
    seconds_to_reward: float | None
    heldout_end: float
    phases: dict[str, float]
    cpu_phases: dict[str, float]


def penstock_side(steps: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> Side:
    """From steps.jsonl and evals.jsonl. Evaluation runs during training and counts in the steps' time."""
    lines = []
    for number, line in enumerate(steps):
        phases = {phase: line["seconds"].get(phase, 0.0) for phase in PENSTOCK_PHASES}
        phases["stage (at the same time)"] = line["seconds"].get("stage", 0.0)
        phases["generation (at the same time)"] = line["generation_seconds"]
        # Before the first request the engine was starting: the clock starts with that request.
        idle = max(0.0, phases["wait"] - line["generation_seconds"]) if number == 0 else 0.0
        lines.append(Step(line["started_at"] + idle, line["ended_at"], line["reward_mean"], phases, {}))
    # If a round ran into the next step, that step's weights generated part of it: it counts from there.
    trained = [
        (next((n for n, line in enumerate(steps, 1) if line["version"] >= each["newest_version"]), len(steps)), each)
        if each["newest_version"]
        else (0, each)
        for each in evals
    ]
    return Side("Penstock", tuple(lines), tuple((number, float(each["accuracy"])) for number, each in trained))


def trl_side(result: dict[str, Any]) -> Side:
    """From the file that `trl_demo` writes. Evaluation runs between the steps."""
    lines = [
        Step(line["started_at"], line["ended_at"], line["reward_mean"], line["seconds"], line["cpu_seconds"])
        for line in result["steps"]
    ]
    evals = tuple((each["steps"], each["accuracy"]) for each in result["evals"])
    return Side(f"TRL, {result['level']}", tuple(lines), evals)


def figures_of(side: Side, cpu: CpuSampler) -> Figures:
    """All figures of one run. Those per step leave out the first NUM_COLD_STEPS, or half of a short run."""
    warm = side.steps[min(NUM_COLD_STEPS, len(side.steps) // 2) :]
    return Figures(
        name=side.name,
        num_steps=len(side.steps),
        seconds_per_step=_mean([step.seconds for step in warm]),
        cpu_seconds_per_step=_mean([cpu.between(step.started_at, step.ended_at) for step in warm]),
        seconds_to_heldout=_seconds_to_heldout(side),
        seconds_to_reward=_seconds_to_reward(side),
        heldout_end=side.evals[-1][1],
        phases={key: _mean([step.phases.get(key, 0.0) for step in warm]) for key in warm[-1].phases},
        cpu_phases={key: _mean([step.cpu_phases.get(key, 0.0) for step in warm]) for key in warm[-1].cpu_phases},
    )


def _seconds_until(side: Side, num_steps: int) -> float:
    return sum(step.seconds for step in side.steps[:num_steps])


def _seconds_to_heldout(side: Side) -> float | None:
    reached = [num_steps for num_steps, accuracy in side.evals if accuracy >= TARGET]
    return _seconds_until(side, reached[0]) if reached else None


def _seconds_to_reward(side: Side) -> float | None:
    rewards = [step.reward_mean for step in side.steps]
    for end in range(REWARD_WINDOW_STEPS, len(rewards) + 1):
        if _mean(rewards[end - REWARD_WINDOW_STEPS : end]) >= TARGET:
            return _seconds_until(side, end)
    return None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(all_figures: Sequence[Figures]) -> str:
    """Markdown: one row per figure; in brackets, the other's value divided by Penstock's."""
    rows: dict[str, list[float | None]] = {
        "wall seconds per step": [each.seconds_per_step for each in all_figures],
        "CPU seconds per step": [each.cpu_seconds_per_step for each in all_figures],
        f"seconds until held-out {TARGET}": [each.seconds_to_heldout for each in all_figures],
        f"seconds until reward {TARGET} ({REWARD_WINDOW_STEPS} steps)": [
            each.seconds_to_reward for each in all_figures
        ],
    }
    lines = [
        "| | " + " | ".join(f"{each.name} ({each.num_steps} steps)" for each in all_figures) + " |",
        "| --- |" + " ---: |" * len(all_figures),
    ]
    for title, values in rows.items():
        lines.append(f"| {title} | " + " | ".join(_cell(value, values[0]) for value in values) + " |")
    ends = " | ".join(f"{each.heldout_end:.2f}" for each in all_figures)
    return "\n".join([*lines, f"| held-out accuracy at the end | {ends} |", "", *map(_split, all_figures)])


def _cell(value: float | None, first: float | None) -> str:
    if value is None:
        return "not reached in these steps"
    return f"{value:.2f}" + (f" ({value / first:.2f} x)" if first and value is not first else "")


def _split(each: Figures) -> str:
    """Where a step's time goes."""
    parts = [
        f"{phase} {seconds:.2f} s" + (f" ({each.cpu_phases[phase]:.2f} CPU s)" if phase in each.cpu_phases else "")
        for phase, seconds in each.phases.items()
    ]
    return f"{each.name}, a step: " + ", ".join(parts) + "."

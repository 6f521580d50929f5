"""What happened so far, one JSON line per step and per evaluation, and the figures made of it.

Owns `steps.jsonl` and `evals.jsonl` in the run's folder: they survive a restart, and a step that is trained again after
one is written once.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock_trainer.telemetry.records import EvalResult, StepLine

REWARD_WINDOW_STEPS = 5  # of the moving average of the training reward


class Progress:
    """The step and evaluation lines of a run, earlier lives of its trainer included."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._steps_path = folder / "steps.jsonl"
        self._evals_path = folder / "evals.jsonl"
        self.steps: list[dict[str, Any]] = _read(self._steps_path)
        self.evals: list[dict[str, Any]] = _read(self._evals_path)

    def add_step(self, line: StepLine) -> None:
        if any(known["step"] == line.step for known in self.steps[-1000:]):
            return
        self.steps.append(_append(self._steps_path, asdict(line)))

    def knows(self, step: int) -> bool:
        """Whether a line of this step is written."""
        return any(known["step"] == step for known in reversed(self.steps))

    def forget_from(self, num_steps: int) -> None:
        """Remove the lines of steps that the ledger does not have: the queue lost them, they are trained anew."""
        kept = [line for line in self.steps if line["step"] < num_steps]
        if len(kept) == len(self.steps):
            return
        temporary = self._steps_path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self._steps_path)
        self.steps[:] = kept

    def add_eval(self, result: EvalResult) -> None:
        self.evals.append(_append(self._evals_path, asdict(result)))

    @property
    def reward_average(self) -> float | None:
        """Moving average of the training reward."""
        recent = [line["reward_mean"] for line in self.steps[-REWARD_WINDOW_STEPS:]]
        return sum(recent) / len(recent) if recent else None

    def seconds_to_reward(self, target: float, started_at: float) -> float | None:
        """Seconds from `started_at` until the moving average reached `target`; None if it has not."""
        for end in range(REWARD_WINDOW_STEPS, len(self.steps) + 1):
            window = [line["reward_mean"] for line in self.steps[end - REWARD_WINDOW_STEPS : end]]
            if sum(window) / len(window) >= target:
                return float(self.steps[end - 1]["ended_at"]) - started_at
        return None

    def mean_seconds(self, skip: int = 2) -> dict[str, float]:
        """Mean seconds per phase over the steps after the first `skip`, which warm up."""
        lines = self.steps[skip:] or self.steps
        phases = {phase for line in lines for phase in line["seconds"]}
        return {phase: sum(line["seconds"].get(phase, 0.0) for line in lines) / len(lines) for phase in sorted(phases)}

    def gap_to_ideal(self, last: int | None = None, skip: int = 2) -> float | None:
        """Step time over the longer of generation and training time, minus 1, over the last steps."""
        lines = (self.steps[skip:] or self.steps)[-(last or len(self.steps)) :]
        if not lines:
            return None
        total = sum(line["seconds"].get("step", 0.0) for line in lines)
        generation = sum(line["generation_seconds"] for line in lines)
        training = sum(
            line["seconds"].get("forward_backward", 0.0) + line["seconds"].get("optimizer", 0.0) for line in lines
        )
        ideal = max(generation, training)
        return total / ideal - 1 if ideal > 0 else None


def _read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last one that a crash cut off is left out and cut from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        path.write_bytes(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _append(path: Path, line: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(line)
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    return dict(json.loads(text))


def last_accuracy(evals: Sequence[dict[str, Any]]) -> float | None:
    """Held-out accuracy of the newest evaluation."""
    return float(evals[-1]["accuracy"]) if evals else None

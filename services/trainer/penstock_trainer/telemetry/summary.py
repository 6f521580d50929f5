"""The figures of a finished run, for `summary.json`.

Owns the names of the fields. The launcher adds its own figures: set-up time, peak memory, restarts.
"""

import json
import math
from collections import deque
from collections.abc import Container, Iterable
from typing import Any

from penstock.broker.trainer import Counters
from penstock_trainer.telemetry.progress import REWARD_WINDOW_STEPS, Progress, Timing, without_warm_up
from penstock_trainer.telemetry.records import StepLine

TARGET_REWARD = 0.9
EPISODE = "episode_"  # before the names of figures of episodes


class _RunFigures:
    """Figures of all steps, from one pass over their lines; `heldout`: steps whose end time is needed."""

    def __init__(self, lines: Iterable[StepLine], heldout: Container[int]) -> None:
        self.num_steps = self.num_non_finite = self.tokens = self.staleness_max = 0
        self.generation_seconds = 0.0
        self.ended_at: float | None = None
        self.reward_reached_at: float | None = None
        self.end_of: dict[int, float] = {}
        self._episodes: dict[str, list[float]] = {}
        rewards: deque[float] = deque(maxlen=REWARD_WINDOW_STEPS)
        for line in lines:
            self._note_episodes(line)
            self.num_steps += 1
            self.num_non_finite += not line.is_finite
            self.tokens += line.generated_tokens
            self.generation_seconds += line.generation_seconds
            self.staleness_max = max(self.staleness_max, line.staleness_max)
            self.ended_at = line.ended_at
            if line.step + 1 in heldout:
                self.end_of[line.step + 1] = line.ended_at
            rewards.append(line.reward_mean)
            if self.reward_reached_at is None and len(rewards) == REWARD_WINDOW_STEPS:
                self.reward_reached_at = line.ended_at if sum(rewards) / len(rewards) >= TARGET_REWARD else None

    def _note_episodes(self, line: StepLine) -> None:
        for name, value in line.statistics.items():
            if name.startswith(EPISODE):
                self._episodes.setdefault(name.removeprefix(EPISODE), []).append(value)

    @property
    def episodes(self) -> dict[str, float]:
        """Means of the steps' figures, the largest of a largest; empty without episodes."""
        return {
            name: max(values) if name.endswith("_max") else math.fsum(values) / self.num_steps
            for name, values in sorted(self._episodes.items())
        }


def make_summary(
    progress: Progress,
    counters: Counters,
    *,
    engine: str,
    model: str,
    max_staleness: int,
    heldout_prompts: int,
    heldout_prompts_trained: int,
    training_started_at: float,
) -> dict[str, Any]:
    """JSON-ready figures of the full run, earlier lives of the trainer included.

    heldout_prompts_trained: held-out prompts that are training prompts too.
    """

    def since_start(at: float | None) -> float | None:
        return None if at is None else at - training_started_at

    evals = sorted(progress.evals(), key=lambda line: line["steps"])  # one that was requested earlier may end later
    successes = [result["steps"] for result in evals if result["accuracy"] >= TARGET_REWARD]
    figures = _RunFigures(progress.step_lines(), frozenset(successes))
    timing = Timing(without_warm_up(progress.step_lines()))
    return {
        "engine": engine,
        "model": model,
        "steps": figures.num_steps,
        "non_finite_steps": figures.num_non_finite,
        "training_started_at": training_started_at,
        "seconds_training": since_start(figures.ended_at) or 0.0,
        "seconds_to_reward_0_9": since_start(figures.reward_reached_at),
        "reward_window_steps": REWARD_WINDOW_STEPS,
        # The end of the step after which held-out accuracy first reached 0.9.
        "seconds_to_heldout_0_9": since_start(
            next((figures.end_of[n] for n in successes if n in figures.end_of), None)
        ),
        "reward_mean_last": progress.reward_average,
        "heldout_accuracy_start": evals[0]["accuracy"] if evals else None,
        "heldout_accuracy_end": evals[-1]["accuracy"] if evals else None,
        "heldout_prompts": heldout_prompts,
        "heldout_prompts_trained": heldout_prompts_trained,
        "staleness_max": figures.staleness_max,
        "max_staleness": max_staleness,
        **({"episodes": figures.episodes} if figures.episodes else {}),
        "tickets": _tickets(counters),
        "seconds_per_step": timing.mean_seconds,
        "generation_seconds_per_step": _ratio(figures.generation_seconds, figures.num_steps),
        "generation_tokens_per_second": _ratio(figures.tokens, figures.generation_seconds),
        "gap_to_ideal": timing.gap_to_ideal,
        "samples_before": evals[0]["samples"] if evals else [],
        "samples_after": evals[-1]["samples"] if evals else [],
    }


def _tickets(counters: Counters) -> dict[str, Any]:
    return {
        "issued": counters.issued,
        "trained": counters.trained,
        "dropped": dict(counters.dropped),
        "outstanding": counters.outstanding,
    }


def _ratio(amount: float, of: float) -> float | None:
    return amount / of if of else None


def summary_bytes(summary: dict[str, Any]) -> bytes:
    """The file's content."""
    return json.dumps(summary, indent=2).encode() + b"\n"

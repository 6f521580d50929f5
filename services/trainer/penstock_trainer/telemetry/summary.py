"""The figures of a finished run, for `summary.json`.

Owns the names of the fields. The launcher adds what only it knows: set-up time, peak memory, restarts.
"""

import json
from typing import Any

from penstock.broker.trainer import Counters
from penstock_trainer.telemetry.progress import REWARD_WINDOW_STEPS, Progress

TARGET_REWARD = 0.9


def make_summary(
    progress: Progress, counters: Counters, *, engine: str, model: str, max_staleness: int, training_started_at: float
) -> dict[str, Any]:
    """JSON-ready figures of the whole run, earlier lives of the trainer included."""
    steps, evals = progress.steps, progress.evals
    ended_at = steps[-1]["ended_at"] if steps else training_started_at
    seconds_training = ended_at - training_started_at
    tokens = sum(line["generated_tokens"] for line in steps)
    generating = sum(line["generation_seconds"] for line in steps)
    return {
        "engine": engine,
        "model": model,
        "steps": len(steps),
        "training_started_at": training_started_at,
        "seconds_training": seconds_training,
        "seconds_to_reward_0_9": progress.seconds_to_reward(TARGET_REWARD, training_started_at),
        "reward_window_steps": REWARD_WINDOW_STEPS,
        "seconds_to_heldout_0_9": _seconds_to_heldout(progress, training_started_at),
        "reward_mean_last": progress.reward_average,
        "heldout_accuracy_start": evals[0]["accuracy"] if evals else None,
        "heldout_accuracy_end": evals[-1]["accuracy"] if evals else None,
        "staleness_max": max((line["staleness_max"] for line in steps), default=0),
        "max_staleness": max_staleness,
        "tickets": {
            "issued": counters.issued,
            "trained": counters.trained,
            "dropped": dict(counters.dropped),
            "outstanding": counters.outstanding,
        },
        "seconds_per_step": progress.mean_seconds(),
        "generation_seconds_per_step": generating / len(steps) if steps else None,
        "generation_tokens_per_second": tokens / generating if generating else None,
        "gap_to_ideal": progress.gap_to_ideal(),
        "samples_before": evals[0]["samples"] if evals else [],
        "samples_after": evals[-1]["samples"] if evals else [],
    }


def _seconds_to_heldout(progress: Progress, training_started_at: float) -> float | None:
    """Until the end of the step after which held-out accuracy was first found to be 0.9."""
    ended_at = {line["step"] + 1: line["ended_at"] for line in progress.steps}
    for result in progress.evals:
        if result["accuracy"] >= TARGET_REWARD and result["steps"] in ended_at:
            return float(ended_at[result["steps"]]) - training_started_at
    return None


def summary_bytes(summary: dict[str, Any]) -> bytes:
    """The file's content."""
    return json.dumps(summary, indent=2).encode() + b"\n"

"""What the trainer says of each step and evaluation: to progress files, metrics, status, trackers and log at once.

Owns the figures of a step.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict

from penstock.contracts import ScoredGroup
from penstock_trainer.batching.masking import oldest_trained_version
from penstock_trainer.learner.update import Replayed, StepResult
from penstock_trainer.rollouts.consumer import Consumer
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.records import StepLine
from penstock_trainer.telemetry.status import Status
from penstock_trainer.telemetry.step_clock import Clock
from penstock_trainer.telemetry.tracking import Tracking

log = logging.getLogger(__name__)


class Reports:
    """Everything that is written down about one run."""

    def __init__(
        self, progress: Progress, metrics: TrainerMetrics, status: Status, consumer: Consumer, tracking: Tracking
    ) -> None:
        self._progress = progress
        self._metrics = metrics
        self._status = status
        self._consumer = consumer
        self._tracking = tracking
        self._first = True
        self._show_run()

    def step(
        self, step: int, groups: Sequence[ScoredGroup], clock: Clock, result: StepResult, versions: tuple[int, int]
    ) -> None:
        """Report a step; `versions`: of the weights before and after it."""
        before, after = versions
        ended_at = time.time()
        completions = [each for group in groups for each in group.group.completions]
        oldest = [oldest_trained_version(each, before, self._consumer.max_lag) for each in completions]
        staleness = [before - version for version in oldest if version is not None]
        values = [score.value for group in groups for score in group.scores if score.value is not None]
        generation = self._consumer.generation
        if self._first and generation.first_started_at is not None:
            clock.begin_at(generation.first_started_at)
        self._first = False
        line = StepLine(
            step=step,
            version=after,
            epoch=(groups[-1].group.ticket.number + 1) / max(1, self._status.num_prompts),
            tickets=tuple(group.group.ticket.number for group in groups),
            started_at=clock.started_at,
            ended_at=ended_at,
            seconds={**clock.seconds, **result.seconds, "step": ended_at - clock.started_at},
            generation_seconds=generation.take_busy_seconds(),
            generated_tokens=generation.take_tokens(),
            reward_mean=sum(values) / len(values) if values else 0.0,
            staleness_max=max(staleness, default=0),
            staleness_mean=sum(staleness) / len(staleness) if staleness else 0.0,
            statistics=figures_of(result),
        )
        self._progress.add_step(line)
        self._tracking.step(line)
        self._metrics.observe_step(line, staleness, outcome=outcome_of(result))
        self._status.steps = step + 1
        self._show_run()
        log.info("step %d", step, extra={"reward_mean": line.reward_mean, "seconds": line.seconds})

    def resumed(self, num_steps: int, replayed: Sequence[Replayed]) -> None:
        """Make the lines those of the ledger: a step whose trainer died before it told of it is told of now."""
        self._progress.forget_from(num_steps)
        self._status.steps = num_steps
        for each in replayed:
            if not self._progress.knows(each.step):
                self.step(each.step, each.groups, Clock(), each.result, each.versions)
        self._show_run()

    def evals(self) -> None:
        """Report the evaluations that have been completed since the last call."""
        while self._consumer.eval_results:
            result = self._consumer.eval_results.pop(0)
            self._progress.add_eval(result)
            self._tracking.evaluation(result)
            self._show_run()
            log.info("held-out accuracy %.3f after %d steps", result.accuracy, result.steps)

    def _show_run(self) -> None:
        self._metrics.show_run(
            num_steps=self._status.steps,
            accuracy=self._progress.last_accuracy,
            gap_to_ideal=self._progress.gap_to_ideal,
        )


def outcome_of(result: StepResult) -> str:
    """trained, unchanged (no completion had a gradient) or non_finite."""
    if result.changed:
        return "trained"
    return "unchanged" if result.is_finite else "non_finite"


def figures_of(result: StepResult) -> dict[str, float]:
    """The numbers of one update by name."""
    statistics = asdict(result.statistics)
    del statistics["masked"]
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_packs": result.num_packs,
        "num_rows": result.num_rows,
        "clipped_ratio": result.statistics.clipped_ratio,
        **statistics,
        **{f"masked_{reason}": share for reason, share in result.statistics.masked.items()},
        **asdict(result.counts),
    }

"""The trainer's reports: its phase, each step and evaluation, and whether it computes or waits.

Owns the figures of a step, and sends them to progress files, samples, metrics, status, trackers and log at once.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict

from penstock.contracts import DropReason, PolicyIdentity, ScoredGroup
from penstock.contracts.outcomes import rewards_of
from penstock.records.step_numbers import number_of
from penstock_trainer.batching.episodes import episode_figures
from penstock_trainer.batching.masking import oldest_trained_version
from penstock_trainer.batching.rewards import failures_of, function_figures
from penstock_trainer.learner.update import Replayed, StepResult
from penstock_trainer.rollouts.evaluation import Evaluation
from penstock_trainer.rollouts.generation_time import GenerationTime
from penstock_trainer.rollouts.samples import SampleWriter
from penstock_trainer.telemetry.last_lines import LastLines
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.records import Histogram, StepLine
from penstock_trainer.telemetry.samples import SampleFile
from penstock_trainer.telemetry.status import ENDING, Status
from penstock_trainer.telemetry.step_clock import Clock
from penstock_trainer.telemetry.tracking import Tracking
from penstock_trainer.watchdog import Watchdog

log = logging.getLogger(__name__)


class Reports:
    """The reports of one life of the trainer.

    reports.phase("waiting for a batch")
    with reports.idle(): ...              the wait is counted as idle
    with reports.computing(): ...         the watchdog stands still
    """

    def __init__(
        self,
        progress: Progress,
        metrics: TrainerMetrics,
        status: Status,
        watchdog: Watchdog,
        generation: GenerationTime,
        evaluation: Evaluation,
        tracking: Tracking,
        samples: SampleFile,
        dropped: LastLines,
        sample_writer: SampleWriter,
        *,
        max_lag: int | None,
        set_figures: Callable[[Sequence[ScoredGroup]], dict[str, dict[str, float]]],
    ) -> None:
        """`max_lag`: staler tokens are masked, and do not count for the staleness. `set_figures`: by training set."""
        self._progress = progress
        self._metrics = metrics
        self._status = status
        self._watchdog = watchdog
        self._generation = generation
        self._evaluation = evaluation
        self._tracking = tracking
        self._samples = samples
        self._dropped = dropped
        self._sample_writer = sample_writer
        self._max_lag = max_lag
        self._set_figures = set_figures
        self._first = True
        self._metrics.show_run(self._status.steps, self._progress)

    def phase(self, phase: str) -> None:
        """Set the present work of the trainer, in words."""
        self._status.work = phase

    def ending(self, phase: str) -> None:
        """Set the present work of a trainer that has trained its last step."""
        self._status.work = f"{ENDING}{phase}"

    def ready(self) -> None:
        """The first version of this life is announced: GET /ready answers 200 from now on."""
        self._status.ready = True

    def computing(self) -> AbstractContextManager[None]:
        """Around the trainer's own work, which is never a stall."""
        return self._watchdog.computing()

    def idle(self) -> AbstractContextManager[None]:
        """Around a wait for a batch or for weights; counts its seconds."""
        return self._metrics.idle.counting()

    def progress(self) -> None:
        """Note an event: the run does not stall."""
        self._watchdog.progress()

    def step(
        self, step: int, groups: Sequence[ScoredGroup], clock: Clock, result: StepResult, versions: tuple[int, int]
    ) -> None:
        """Report a step; `versions`: of the weights before and after it."""
        line, staleness = self._line(step, groups, clock, result, versions)
        self._samples.add(step, self._sample_writer.lines(step, groups, result.advantages))
        self._progress.add_step(line)
        self._tracking.step(line)
        self._metrics.observe_step(line, staleness, outcome=outcome_of(result))
        self._status.steps = step + 1
        self._metrics.show_run(self._status.steps, self._progress)
        log.info("step %d", number_of(step), extra={"reward_mean": line.reward_mean, "seconds": line.seconds})

    def _line(
        self, step: int, groups: Sequence[ScoredGroup], clock: Clock, result: StepResult, versions: tuple[int, int]
    ) -> tuple[StepLine, list[int]]:
        """The line of a step, and the staleness of each completion that has one."""
        before, after = versions
        trajectories = [each for group in groups for each in group.group.trajectories]
        oldest = [oldest_trained_version(each, before, self._max_lag) for each in trajectories]
        staleness = [before - version for version in oldest if version is not None]
        values = [reward for group in groups for reward in rewards_of(group) if reward is not None]
        generation = self._generation
        if self._first and generation.first_started_at is not None:
            clock.begin_at(generation.first_started_at)
        self._first = False
        elapsed = clock.elapsed_seconds
        line = StepLine(
            step=step,
            version=after,
            epoch=(groups[-1].group.ticket.number + 1) / max(1, self._status.num_prompts),
            tickets=tuple(group.group.ticket.number for group in groups),
            started_at=clock.started_at,
            ended_at=clock.started_at + elapsed,
            seconds={**clock.seconds, **result.seconds, "step": elapsed},
            generation_seconds=generation.take_busy_seconds(),
            generated_tokens=generation.take_tokens(),
            reward_mean=sum(values) / len(values) if values else 0.0,
            staleness_max=max(staleness, default=0),
            staleness_mean=sum(staleness) / len(staleness) if staleness else 0.0,
            statistics={**figures_of(result), **episode_figures(groups)},
            rewards=function_figures(groups),
            failures=failures_of(groups),
            histograms=histograms_of(
                reward=values,
                advantage=list(result.advantages.values()),
                length=[each.num_tokens for each in trajectories],
                staleness=staleness,
            ),
            pushes=clock.pushes,
            sets=self._set_figures(groups),
        )
        return line, staleness

    def is_reported(self, step: int) -> bool:
        """Whether the line of a step is written, in this life or an earlier one."""
        return self._progress.has_step(step)

    @property
    def non_finite_in_a_row(self) -> int:
        """The steps up to the last reported one whose figures are not finite."""
        return self._progress.non_finite_in_a_row

    def dropped(self, reason: DropReason, group: ScoredGroup | None) -> None:
        """Report a ticket that ends without training, with the group that came of it, if one did."""
        self._status.dropped[reason] = self._status.dropped.get(reason, 0) + 1
        if group is not None:
            self._dropped.add(self._sample_writer.dropped(self._status.steps, group, reason))

    def resumed(
        self, num_steps: int, version: int, replayed: Sequence[Replayed], dropped: Iterable[DropReason]
    ) -> None:
        """Bring the lines in step with the ledger: report each step whose trainer died before it reported it.

        `dropped`: why each ticket was that earlier lives dropped.
        """
        self._status.dropped = {str(reason): count for reason, count in Counter(dropped).items()}
        self._progress.forget_from(num_steps)
        self._samples.forget_from(self._progress.highest_step + 1)  # those of a step without a line may be incomplete
        self._status.steps = num_steps
        self._status.first_step = self._progress.highest_step + 1
        for each in replayed:
            self.step(each.step, each.groups, Clock(), each.result, each.versions)
        self._status.policy = PolicyIdentity(version, "")
        self._metrics.show_run(self._status.steps, self._progress)

    def evals(self) -> None:
        """Report the evaluations that have been completed since the last call."""
        for result in self._evaluation.take_results():
            self._progress.add_eval(result)
            self._tracking.evaluation(result)
            self._metrics.show_run(self._status.steps, self._progress)
            log.info(
                "after %d steps: accuracy %s of %d held-out prompts (%s); %d failed",
                result.steps,
                "-" if result.accuracy is None else f"{result.accuracy:.3f}",
                result.num_scored,
                result.set,
                result.num_failed,
            )


def outcome_of(result: StepResult) -> str:
    """trained, unchanged (no completion had a gradient) or non_finite (in any mini-batch)."""
    if not result.is_finite:
        return "non_finite"
    return "trained" if result.changed else "unchanged"


def histograms_of(**values: Sequence[float]) -> dict[str, Histogram]:
    """By name, of the finite values; a name without any is absent."""
    finite = {name: [each for each in some if math.isfinite(each)] for name, some in values.items()}
    return {name: Histogram.of(some) for name, some in finite.items() if some}


def figures_of(result: StepResult) -> dict[str, float]:
    """The numbers of one update by name. What there was no token to measure on is absent: it is neither 0 nor nan.

    A nan that was measured stays.
    """
    figures, statistics = _all_figures(result), result.statistics
    absent = {name for name in ("length_trained", "length_bias") if math.isnan(figures[name])}
    if not statistics.num_tokens:
        absent |= {name for name, value in _token_figures(result).items() if math.isnan(value)}
        absent |= {"loss"} if not statistics.num_non_finite else set()
    return {name: value for name, value in figures.items() if name not in absent}


def _token_figures(result: StepResult) -> dict[str, float]:
    """Of the statistics, which cover tokens."""
    statistics = asdict(result.statistics)
    masked, experts = statistics.pop("masked"), statistics.pop("experts")
    return {
        "clipped_ratio": result.statistics.clipped_ratio,
        **{name: value for name, value in statistics.items() if value is not None},
        **{f"masked_{reason}": share for reason, share in masked.items()},
        **{f"expert_{name}": value for name, value in experts.items()},
    }


def _all_figures(result: StepResult) -> dict[str, float]:
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "num_packs": result.num_packs,
        "num_rows": result.num_rows,
        **_token_figures(result),
        **asdict(result.counts),
    }

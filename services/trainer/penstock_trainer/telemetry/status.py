"""The present state of the trainer, for `GET /v1/status` and its record in the queue.

Owns what of it is derived: epoch, rates, shares and the time that is left, and the words for a trainer that ends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.contracts import PolicyIdentity
from penstock.contracts.status import HeldOutFigures, StepFigures, TrainerStatus
from penstock.contracts.vocabulary import MAIN_SET
from penstock_trainer.telemetry.progress import EvalBrief, Progress
from penstock_trainer.telemetry.records import StepLine

NOTHING_STAGED = PolicyIdentity(0, "")
ENDING = "ending: "  # before the phases that follow the last step
TRAINING = "training"


@dataclass
class Status:
    """The current state of a trainer; the loop writes it, all others read it."""

    run: str
    max_staleness: int
    batch_size: int
    num_prompts: int
    total_steps: int
    progress: Progress
    kl_of: str = "behaviour"
    """The policy from which people are shown the divergence: the reference, if the loss has it."""
    is_stopping: Callable[[], bool] = lambda: False
    """Whether the trainer was asked to end: it finishes its present work first."""
    work: str = "loading the model"
    """Its present work, in words."""
    steps: int = 0
    first_step: int | None = None
    """Steps that were reported before this life; None until it has resumed."""
    policy: PolicyIdentity = NOTHING_STAGED
    """Of the newest weights; without a digest until these are staged."""
    outstanding: int = 0
    oldest_waiting_seconds: float = 0.0
    waiting_for: str = ""
    """The ticket that holds up a batch, and its holder; empty until one does for long."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Tickets of the full run that ended without training, by reason."""
    queue: dict[str, int] = field(default_factory=dict)
    ready: bool = False
    fenced: dict[str, str] = field(default_factory=dict)
    """Servers that did not take the last push, and why."""
    turn: str = ""
    """Who has the GPUs, with `trainer.take_turns`."""

    @property
    def phase(self) -> str:
        """Its present work, and whether it is the end of the run."""
        if not self.is_stopping() or self.work.startswith(ENDING):
            return self.work
        return ENDING + ("finishing the step" if self.work == TRAINING else self.work)

    def shown(self) -> TrainerStatus:
        """The answer to `GET /v1/status`."""
        recent = self.progress.recent
        seconds = [line.seconds["step"] for line in recent]
        step_seconds = sum(seconds) / len(seconds) if seconds else None
        tokens = sum(line.generated_tokens for line in recent)
        first, last = self.progress.first_eval, self.progress.last_eval
        return TrainerStatus(
            run=self.run,
            phase=self.phase,
            step=self.steps,
            total_steps=self.total_steps,
            epoch=round(self.steps * self.batch_size / self.num_prompts, 3) if self.num_prompts else 0.0,
            policy_version=self.policy.number,
            outstanding=self.outstanding,
            oldest_waiting_seconds=self.oldest_waiting_seconds,
            reward_mean=recent[-1].reward_mean if recent else None,
            reward_average=self.progress.reward_average,
            heldout_accuracy=last.accuracy,
            staleness_max=self.progress.staleness_max,
            staleness_mean=recent[-1].staleness_mean if recent else None,
            max_staleness=self.max_staleness,
            dropped={**self.dropped},
            queue={**self.queue},
            tokens_per_second=tokens / sum(seconds) if seconds else None,
            gap_to_ideal=self.progress.gap_to_ideal,
            step_seconds=step_seconds,
            eta_seconds=step_seconds * max(0, self.total_steps - self.steps) if step_seconds else None,
            waiting_for=self.waiting_for,
            fenced=self.fenced,
            turn=self.turn,
            heldout_steps=last.steps,
            heldout_prompts=last.num_prompts,
            heldout_failed=last.num_failed,
            heldout_reward=last.reward,
            heldout_steps_start=first.steps,
            heldout_accuracy_start=first.accuracy,
            heldout_reward_start=first.reward,
            heldout_prompts_start=first.num_prompts,
            heldout_failed_start=first.num_failed,
            first_step=self.first_step,
            steps=tuple(step_figures(line, self.kl_of) for line in self.progress.kept),
            kl_of=self.kl_of,
            heldout_sets={
                name: _held_out(*self.progress.ends_of(name))
                for name in self.progress.evaluated_sets
                if name != MAIN_SET
            },
        )


def _held_out(first: EvalBrief, last: EvalBrief) -> HeldOutFigures:
    return HeldOutFigures(
        accuracy=last.accuracy,
        accuracy_start=first.accuracy,
        steps=last.steps,
        steps_start=first.steps,
        prompts=last.num_prompts,
        prompts_start=first.num_prompts,
        failed=last.num_failed,
        failed_start=first.num_failed,
        reward=last.reward,
        reward_start=first.reward,
    )


def step_figures(line: StepLine, kl_of: str) -> StepFigures:
    """A step as people follow it. A line of another release may lack figures."""

    def known(name: str) -> float | None:
        value = line.statistics.get(name, math.nan)
        return value if math.isfinite(value) else None

    return StepFigures(
        number=line.step + 1,
        reward=known("reward_mean") if "reward_mean" in line.statistics else line.reward_mean,
        loss=known("loss"),
        kl=known(f"{kl_of}_kl"),
        entropy=known("entropy"),
        length=known("length_generated"),
        learning_rate=known("learning_rate"),
        failed_ratio=known("failed_reward_ratio"),
        no_signal_ratio=known("no_signal_ratio"),
        staleness_max=line.staleness_max,
        staleness_mean=line.staleness_mean,
        seconds=line.seconds.get("step"),
        is_finite=line.is_finite,
    )

"""The present state of the trainer, for `GET /v1/status` and its record in the queue.

Owns what of it is derived: epoch, rates and the time that is left.
"""

import math
from dataclasses import dataclass, field

from penstock.contracts import PolicyIdentity
from penstock.contracts.status import TrainerStatus
from penstock_trainer.telemetry.progress import Progress

NOTHING_STAGED = PolicyIdentity(0, "")


@dataclass
class Status:
    """The current state of a trainer; the loop writes it, all others read it."""

    run: str
    max_staleness: int
    batch_size: int
    num_prompts: int
    total_steps: int
    progress: Progress
    phase: str = "loading the model"
    steps: int = 0
    policy: PolicyIdentity = NOTHING_STAGED
    """Of the newest weights; without a digest until these are staged."""
    outstanding: int = 0
    oldest_waiting_seconds: float = 0.0
    waiting_for: str = ""
    """The ticket that holds up a batch, and its holder; empty until one does for long."""
    queue: dict[str, int] = field(default_factory=dict)
    ready: bool = False
    fenced: dict[str, str] = field(default_factory=dict)
    """Servers that did not take the last push, and why."""
    turn: str = ""
    """Who has the GPUs, with `trainer.take_turns`."""

    def shown(self) -> TrainerStatus:
        """The answer to `GET /v1/status`."""
        recent = self.progress.recent
        seconds = [line.seconds["step"] for line in recent]
        step_seconds = sum(seconds) / len(seconds) if seconds else None
        tokens = sum(line.generated_tokens for line in recent)
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
            heldout_accuracy=self.progress.last_accuracy,
            staleness_max=self.progress.staleness_max,
            staleness_mean=recent[-1].staleness_mean if recent else None,
            max_staleness=self.max_staleness,
            queue={**self.queue},
            tokens_per_second=tokens / sum(seconds) if seconds else None,
            gap_to_ideal=self.progress.gap_to_ideal,
            step_seconds=step_seconds,
            eta_seconds=step_seconds * max(0, self.total_steps - self.steps) if step_seconds else None,
            waiting_for=self.waiting_for,
            fenced=self.fenced,
            turn=self.turn,
        )


def expected_steps(num_draws: int, batch_size: int, max_steps: int) -> int:
    """Steps of the full run if no ticket is dropped."""
    steps = math.ceil(num_draws / batch_size)
    return min(steps, max_steps) if max_steps else steps

"""What the trainer answers to `GET /v1/status`, and what `penstock status` and the live view show of it.

Owns the names of its fields. Invariant: what is not known yet is None, never 0; a reader ignores a field that it does
not know, and shows one that is missing as not known. Everybody may read it: it holds no prompt and no completion.
"""

import msgspec

from penstock.contracts.wire import Contract


class StepFigures(Contract, frozen=True, forbid_unknown_fields=False):
    """One step, as people follow it.

    number: of steps up to this one, from 1. kl: `TrainerStatus.kl_of` says from what. length: mean loss tokens of a
    completion. failed_ratio: rewards that failed. no_signal_ratio: groups that gave no gradient, since their rewards
    are all equal, or fewer than two are valid. is_finite: whether loss and gradient are numbers.
    """

    number: int
    reward: float | None = None
    loss: float | None = None
    kl: float | None = None
    entropy: float | None = None
    length: float | None = None
    learning_rate: float | None = None
    failed_ratio: float | None = None
    no_signal_ratio: float | None = None
    staleness_max: int | None = None
    staleness_mean: float | None = None
    seconds: float | None = None
    is_finite: bool = True


class HeldOutFigures(Contract, frozen=True, forbid_unknown_fields=False):
    """The figures of a set of held-out prompts beside the main one, named as those of TrainerStatus are."""

    accuracy: float | None = None
    accuracy_start: float | None = None
    steps: int | None = None
    steps_start: int | None = None
    prompts: int | None = None
    prompts_start: int | None = None
    failed: int | None = None
    failed_start: int | None = None
    reward: float | None = None
    reward_start: float | None = None


class TrainerStatus(Contract, frozen=True, forbid_unknown_fields=False):
    """The present state of a run.

    epoch: passes over the prompts. policy_version: of the newest weights. reward_average: over the last steps.
    heldout_steps: steps before the evaluation that heldout_accuracy and heldout_reward (a mean) are of;
    heldout_prompts, heldout_failed: its prompts, and those of them without a reward, which both leave out;
    heldout_..._start: of the first one. All are of the main set; heldout_sets: those of each other set, by its name.
    staleness_max: of all steps; staleness_mean: of the last one; max_staleness: what the run allows, in versions.
    dropped: tickets of the run that ended without training, by reason. queue: groups by stream. waiting_for: the
    ticket that holds up a batch, and who holds it; empty if none does for long. fenced: servers that did not take
    the last push, and why. turn: who has the GPUs with `trainer.take_turns`: engines, trainer, or the way to one of
    them. first_step: steps that were reported before this life of the trainer; None before it has resumed. steps:
    the last ones, in order. kl_of: the policy from which `kl` of the steps is measured, teacher, reference or
    behaviour.
    """

    run: str = ""
    phase: str = ""
    step: int = 0
    total_steps: int | None = None
    epoch: float | None = None
    policy_version: int | None = None
    outstanding: int | None = None
    oldest_waiting_seconds: float | None = None
    reward_mean: float | None = None
    reward_average: float | None = None
    heldout_accuracy: float | None = None
    staleness_max: float | None = None
    staleness_mean: float | None = None
    max_staleness: int | None = None
    dropped: dict[str, int] = msgspec.field(default_factory=dict)
    queue: dict[str, int | None] = msgspec.field(default_factory=dict)
    tokens_per_second: float | None = None
    gap_to_ideal: float | None = None
    step_seconds: float | None = None
    eta_seconds: float | None = None
    waiting_for: str | None = None
    fenced: dict[str, str] = msgspec.field(default_factory=dict)
    turn: str | None = None
    heldout_steps: int | None = None
    heldout_prompts: int | None = None
    heldout_failed: int | None = None
    heldout_accuracy_start: float | None = None
    heldout_prompts_start: int | None = None
    heldout_failed_start: int | None = None
    heldout_reward: float | None = None
    heldout_reward_start: float | None = None
    heldout_steps_start: int | None = None
    first_step: int | None = None
    steps: tuple[StepFigures, ...] = ()
    kl_of: str = ""
    heldout_sets: dict[str, HeldOutFigures] = msgspec.field(default_factory=dict)

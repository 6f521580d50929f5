"""Start of a trainer: from the ledger's newest checkpoint, through the step files after it, to the ledger's head.

Owns what a restart trains again. Invariant: it trains the same groups in the same order as before, pushes nothing, and
where arithmetic is deterministic and the number of ranks is the same, each step's weights must have the digest that the
ledger holds. Called once by the
loop.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import CheckpointRecord, LedgerState, RunRecord
from penstock.errors import ConfigError, WeightsError
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import Replayed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where the learner stands: steps trained and the version of its weights."""

    steps: int
    version: int


def check_same_run(ledger: LedgerState, current: RunRecord) -> None:
    """ConfigError when what fixes the meaning of ticket numbers has changed since the run began."""
    if ledger.run is None or ledger.run == current:
        return
    keys = {
        "dataset_digest": "data.train (its content)",
        "dataset_length": "data.train (its number of rows)",
        "batch_size": "data.batch_size",
        "group_size": "actor.group_size",
        "seed": "run.seed",
    }
    changed = [
        f"{key} was {getattr(ledger.run, name)} and is {getattr(current, name)}"
        for name, key in keys.items()
        if getattr(ledger.run, name) != getattr(current, name)
    ]
    raise ConfigError(
        f"this run cannot be resumed: {'; '.join(changed)}. Expected the values it began with; "
        "set them back, choose another run.name, or set run.existing to replace"
    )


def newest_checkpoint(ledger: LedgerState, checkpoints: Checkpoints) -> CheckpointRecord | None:
    """The newest checkpoint that the ledger names and that is there."""
    return next((record for record in reversed(ledger.checkpoints) if checkpoints.exists(record)), None)


def restore(
    learner: Learner,
    ledger: LedgerState,
    checkpoints: Checkpoints,
    step_files: StepFiles,
    digest_of: Callable[[int], PolicyIdentity],
    on_replayed: Callable[[Replayed], None] | None = None,
) -> Position:
    """Bring the learner to the ledger's head. Blocking: call it in a thread.

    digest_of: version -> identity of the learner's present weights. WeightsError when a replayed step differs.
    on_replayed: told of each step that is trained again, in order.
    """
    position = Position(0, 0)
    record = newest_checkpoint(ledger, checkpoints)
    if record is not None:
        meta, folder = checkpoints.read(record.name)
        learner.load(folder)
        position = Position(meta.steps, meta.version)
        log.info("checkpoint %s is loaded", record.name)
    for step in sorted(ledger.steps, key=lambda each: each.step):
        if step.step < position.steps:
            continue
        if step.version is not None and step.version != position.version:
            raise WeightsError(
                f"step {step.step} is trained again on version {position.version}; the ledger says that it trained "
                f"version {step.version}: a step before it changed the weights in one of both and not in the other"
            )
        groups = step_files.read(step)
        result = learner.update(groups, version=position.version, max_lag=step.max_lag)
        version = position.version + int(result.changed)
        versions = (position.version, version)
        position = Position(step.step + 1, version)
        known = ledger.policies.get(version)
        same_bits = learner.is_deterministic and ledger.num_ranks.get(version) == learner.num_ranks
        if known is not None and same_bits and (found := digest_of(version)) != known:
            raise WeightsError(f"step {step.step} was trained again and gave weights {found}; the ledger says {known}")
        if on_replayed is not None:
            on_replayed(Replayed(step.step, groups, result, versions))
        log.info("step %d is trained again", step.step)
    return position

"""Start of a trainer: from the ledger's newest checkpoint, through the step files after it, to the ledger's head.

Owns the choice of the steps to train again. Invariant: they have the same groups in the same order as before, and
nothing is pushed; each is trained with the settings of its own, whatever the configuration is now. So if arithmetic is
deterministic and the number of ranks is the same, the weights after each step must have the digest of the ledger. A
step whose weights are not in the ledger is trained as configured now: its own settings may be what broke them.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import LedgerState
from penstock.errors import ConfigError, WeightsError
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.checkpoints.history import History, newest_checkpoint
from penstock_trainer.checkpoints.settings import StepConfigs
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.update import Replayed
from penstock_trainer.releases import Releases
from penstock_trainer.reports import Reports
from penstock_trainer.rollouts.consumer import Consumer
from penstock_trainer.weights.files import published_format

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """The position of the learner: steps trained and the version of its weights. Before the first step: (0, 0)."""

    steps: int
    version: int


async def resume(
    learner: Learner, history: History, releases: Releases, rollouts: Consumer, reports: Reports
) -> ResumePoint:
    """Bring learner, tickets and reports to the end of the ledger."""
    reports.phase("taking the model's fingerprint")
    with reports.computing():
        model = await asyncio.to_thread(learner.fingerprint)
    ledger = await history.open(model)
    reports.phase("resuming" if ledger.num_steps else "beginning the run")
    await releases.reopen(ledger)
    replayed: list[Replayed] = []

    def keep(each: Replayed) -> None:
        values = each.result.log_ratios.by_trajectory(
            each.groups, version=each.versions[0], max_lag=each.record.max_lag
        )
        history.write_log_ratios(each.record, values)
        if not reports.is_reported(each.step):
            replayed.append(each)

    with reports.computing():
        position = await asyncio.to_thread(
            restore,
            learner,
            ledger,
            history.checkpoints,
            history.step_files,
            history.configs,
            releases.digest,
            keep,
        )
    reports.resumed(position.steps, position.version, replayed, ledger.dropped.values())
    await rollouts.restore(ledger, steps=position.steps, version=position.version)
    return position


def restore(
    learner: Learner,
    ledger: LedgerState,
    checkpoints: Checkpoints,
    step_files: StepFiles,
    configs: StepConfigs,
    digest_of: Callable[[int], PolicyIdentity],
    on_replayed: Callable[[Replayed], None] | None = None,
) -> ResumePoint:
    """Bring the learner to the end of the ledger, and give it the present settings. Blocking: call it in a thread.

    digest_of: version -> identity of the learner's current weights. WeightsError if a replayed step differs,
    ConfigError if its groups lack what the present settings need.
    on_replayed: called with each step that is trained again, in order.
    """
    position = ResumePoint(0, 0)
    form = str(published_format(configs.config))
    record = newest_checkpoint(ledger, checkpoints)
    if record is not None:
        meta, folder = checkpoints.read(record.name)
        learner.load(folder)
        position = ResumePoint(meta.steps, meta.version)
        log.info("checkpoint %s is loaded", record.name)
    for step in sorted(ledger.steps, key=lambda each: each.step):
        if step.step < position.steps:
            continue
        if step.version is not None and step.version != position.version:
            raise WeightsError(
                f"step {step.number} is trained again on version {position.version}; the ledger records that it "
                f"trained version {step.version}: a step before it changed the weights in one of both and not in the "
                "other"
            )
        groups = step_files.read(step)
        config = configs.config if step is ledger.unfinished else configs.of(step)
        if config.teacher.urls and not all(each.is_taught for each in groups):
            raise ConfigError(
                f"step {step.number} was scored before teacher.urls named servers, and is trained again as configured "
                "now, since its weights or its configuration were not recorded: start once with teacher.urls as it "
                "was, and set it after a further step"
            )
        learner.use(config, num_steps=configs.num_steps(config))
        result = learner.update(groups, version=position.version, max_lag=step.max_lag)
        version = position.version + int(result.changed)
        versions = (position.version, version)
        position = ResumePoint(step.step + 1, version)
        known = ledger.policies.get(version)
        same_bits = learner.is_deterministic and ledger.num_ranks.get(version) == learner.num_ranks
        same_form = ledger.forms.get(version, "") in ("", form)
        if known is not None and same_bits and same_form and (found := digest_of(version)) != known:
            unknown = "" if step.settings else "; the configuration of that step is not recorded: set changed keys back"
            raise WeightsError(
                f"step {step.number} was trained again and gave weights {found}; the ledger records {known}{unknown}"
            )
        if on_replayed is not None:
            on_replayed(Replayed(step, groups, result, versions))
        log.info("step %d is trained again", step.number)
    learner.use(configs.config, num_steps=configs.num_steps(configs.config))
    return position

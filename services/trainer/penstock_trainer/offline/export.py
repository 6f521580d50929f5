"""`penstock export`: the weights of any checkpoint of a run as a Hugging Face folder.

Owns the choice of the checkpoint: a name, the newest one, or the best evaluated one, whose weights are those that were
evaluated: their digest is that of the ledger. Needs the run's folder and the model of actor.path, but no queue, GPU or
services; any number of ranks may have written the checkpoint.
"""

from functools import partial
from pathlib import Path

import torch

from penstock.config import Config
from penstock.contracts.ledger import CheckpointRecord, WeightsRecord
from penstock.errors import ConfigError, WeightsError
from penstock.records.run import RunRecords
from penstock.weights.manifest import identity_digest
from penstock_trainer.checkpoints.best import BestCheckpoint, best_checkpoint
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.learner.training_state import load_model_state
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.lora import adapted, merged_weights
from penstock_trainer.weights.files import Format, Weights, digests, master_weights, published_format
from penstock_trainer.weights.hugging_face import save_folder

BEST = "best"


def export_checkpoint(config: Config, name: str | None, out: Path) -> str:
    """Write the checkpoint `name`, the best (`best`) or the newest one to `out`, rounded as it is published.

    Returns its name, of the best one with its evaluation. WeightsError if the best one holds other weights than those
    that were evaluated.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists already: expected a folder that does not; choose another one")
    records = RunRecords(Path(config.run.root) / config.run.name)
    checkpoints = Checkpoints(records.folder / "checkpoints", config.checkpoint.keep)
    best = _best(config, checkpoints, records) if name == BEST and not checkpoints.holds(BEST) else None
    chosen = _chosen(config, checkpoints, name) if best is None else best.record.name
    meta, folder = checkpoints.read(chosen)
    torch.set_num_threads(config.actor.num_threads)  # merging is a product: as many threads give the trainer's bits
    model = load_model(config.actor.path, "actor.path")
    adapter = adapted(model, config)
    load_model_state(folder, model, adapter)
    form, weights = published_format(config), merged_weights(model, adapter)
    if best is not None:
        _require_evaluated(best, records, weights, form, is_merged=adapter is not None)
    save_adapter = partial(adapter.save, get=master_weights(model).__getitem__) if adapter else None
    save_folder(model, weights, config.actor.path, out, form, save_adapter, meta.steps, "--out")
    return chosen if best is None else f"{chosen}, the best ({_evaluated(config, best)}),"


def _evaluated(config: Config, best: BestCheckpoint) -> str:
    section, evaluation = config.eval, best.evaluation
    return f"{section.best_metric} of {section.best_set} {evaluation.value:.4g} after {evaluation.steps} steps"


def _best(config: Config, checkpoints: Checkpoints, records: RunRecords) -> BestCheckpoint:
    committed = [each for each in records.ledger() if isinstance(each, CheckpointRecord) and checkpoints.exists(each)]
    best = best_checkpoint(committed, records.evaluations(), config.eval)
    if best is None:
        raise ConfigError(
            f"--checkpoint best: run {config.run.name!r} in {config.run.root} has no checkpoint of evaluated weights "
            f"by the {config.eval.best_metric} of {config.eval.best_set}: expected a run with checkpoint.keep_best, "
            "and an evaluation after its first step; there are the checkpoints "
            f"{', '.join(checkpoints.names()) or '(none)'}"
        )
    return best


def _require_evaluated(
    best: BestCheckpoint, records: RunRecords, weights: Weights, form: Format, *, is_merged: bool
) -> None:
    """WeightsError unless these are the weights that the ledger names after as many steps, and those evaluated.

    A merged adapter has the same bits only if its trainer merged it on a CPU too.
    """
    steps = best.evaluation.steps
    recorded = [each for each in records.ledger() if isinstance(each, WeightsRecord) and each.steps == steps]
    if not recorded:  # an end of the process, between the ledger and the journal
        return
    policy = recorded[-1].policy
    same_form = recorded[-1].form in ("", str(form)) and (not is_merged or recorded[-1].device == "cpu")
    found = identity_digest(digests(weights, form)) if same_form else policy.digest
    if policy.number != best.evaluation.version or found != policy.digest:
        raise WeightsError(
            f"checkpoint {best.record.name} has weights {best.evaluation.version}-{found[:8]} by its evaluation and "
            f"its tensors; the ledger records {policy} after {steps} steps: expected the weights that were evaluated; "
            "export another checkpoint by its name"
        )


def _chosen(config: Config, checkpoints: Checkpoints, name: str | None) -> str:
    """A name that was asked for may be that of a user's copy."""
    if name is not None and checkpoints.holds(name):
        return name
    names = checkpoints.names()
    if not names:
        raise ConfigError(
            f"run {config.run.name!r} in {config.run.root} has no checkpoint: expected at least one; check run.name "
            "and run.root, or let the run reach checkpoint.every_steps"
        )
    if name is not None:
        raise ConfigError(
            f"--checkpoint {name!r} is none of run {config.run.name!r}: expected one of {', '.join(names)}"
        )
    return names[-1]

"""`penstock export`: the weights of any checkpoint of a run as a Hugging Face folder.

Owns the choice of the checkpoint. Needs the run's folder and the model of actor.path, but no queue, GPU or services;
any number of ranks may have written the checkpoint.
"""

from functools import partial
from pathlib import Path

import torch

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_trainer.checkpoints.folders import Checkpoints
from penstock_trainer.learner.training_state import load_model_state
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.lora import adapted, merged_weights
from penstock_trainer.weights.files import master_weights, published_format
from penstock_trainer.weights.hugging_face import save_folder


def export_checkpoint(config: Config, name: str | None, out: Path) -> str:
    """Write the checkpoint `name`, or the newest one, to `out`, rounded as it is published; returns its name."""
    if out.exists():
        raise ConfigError(f"--out {out} exists already: expected a folder that does not; choose another one")
    checkpoints = Checkpoints(Path(config.run.root) / config.run.name / "checkpoints", config.checkpoint.keep)
    chosen = _chosen(config, checkpoints, name)
    meta, folder = checkpoints.read(chosen)
    torch.set_num_threads(config.actor.num_threads)  # merging is a product: as many threads give the trainer's bits
    model = load_model(config.actor.path, "actor.path")
    adapter = adapted(model, config)
    load_model_state(folder, model, adapter)
    form = published_format(config)
    save_adapter = partial(adapter.save, get=master_weights(model).__getitem__) if adapter else None
    save_folder(model, merged_weights(model, adapter), config.actor.path, out, form, save_adapter, meta.steps, "--out")
    return chosen


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

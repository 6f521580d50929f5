"""What cannot change within a run: whether a configuration can go on with the run that a folder holds.

Owns the comparison and its message. Imports no torch: a launch asks before it starts anything.
"""

import msgspec

from penstock.config import Config
from penstock.contracts.ledger import RunRecord
from penstock.errors import ConfigError
from penstock_trainer.checkpoints.journal import Journal

FIXED = {
    "dataset_digest": "data.train, data.train_sets, data.prompt_template or data.system_prompt (the prompts)",
    "dataset_length": "data.train or data.train_sets (its number of rows; with data.too_long drop, of those that fit)",
    "batch_size": "data.batch_size",
    "group_size": "actor.group_size",
    "seed": "run.seed",
}
"""Field of the record that begins a run -> the key behind it."""


def check_same_run(begun: RunRecord, current: RunRecord) -> None:
    """ConfigError if anything has changed that cannot change within a run. An empty model is not known yet."""
    changed = [
        f"{key} was {getattr(begun, name)} and is {getattr(current, name)}"
        for name, key in FIXED.items()
        if getattr(begun, name) != getattr(current, name)
    ]
    if begun.draws != current.draws:
        before, now = (each.draws or "one set, shuffled" for each in (begun, current))
        changed.append(
            f"data.train_sets, data.shuffle or data.curriculum (how prompts are drawn) was {before} and is {now}"
        )
    if begun.model and begun.lora != current.lora:
        changed.append(f"actor.lora was {begun.lora or 'off'} and is {current.lora or 'off'}")
    if begun.model and current.model and begun.model != current.model:
        before, now = (f"{each.model_path} (weights {each.model})" for each in (begun, current))
        changed.append(f"actor.path was {before} and is {now}")
    if changed:
        raise ConfigError(
            f"this run cannot be resumed: {'; '.join(changed)}. Expected the values it began with: set them back, or "
            "choose another run.name (run.existing replace would delete what this run has trained)"
        )


def check_settings(journal: Journal, config: Config) -> bool:
    """ConfigError if a journal's run has begun with other settings; False if it has no finished step to go on from.

    Data and model are compared when they are read.
    """
    state = journal.read()
    if state.run is None or not state.has_finished_steps:
        return False
    current = msgspec.structs.replace(
        state.run,
        batch_size=config.data.batch_size,
        group_size=config.actor.group_size,
        seed=config.run.seed,
        lora=config.actor.lora.described,
    )
    check_same_run(state.run, current)
    return True

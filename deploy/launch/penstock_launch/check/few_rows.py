"""The first rows of each set of a run, training and held out, as its rewards get them.

Owns which rows the look at rewards takes, and in which order. Importing this imports no transformers: plain text needs
no tokenizer.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest

from penstock.config import Config
from penstock_launch.check.paths import FEW_ROWS
from penstock_launch.check.rewards import Sample
from penstock_trainer.data.datasets import rows_of_set
from penstock_trainer.data.held_out import rows_of
from penstock_trainer.data.prompts import EncodedPrompt
from penstock_trainer.data.rows import Row

Sets = Mapping[str, Sequence[Row]]
"""Rows by the key of their set's section."""


def set_keys(config: Config) -> list[str]:
    """The keys of all sets of a run: training sets, then held-out ones."""
    return [each.key for each in config.data.training_sets] + [each.key for each in config.held_out_sets]


def of_sets(config: Config, wrong: Collection[str] = ()) -> Sets:
    """The first rows of each set but those in `wrong`, each with the name of its reward; DataError for a bad row."""
    of_episodes = config.agent.enabled
    training = {
        each.key: list(rows_of_set(each, of_episodes=of_episodes, first=FEW_ROWS))
        for each in config.data.training_sets
        if each.key not in wrong
    }
    held_out = {each.key: rows_of(each, config, FEW_ROWS) for each in config.held_out_sets if each.key not in wrong}
    return training | held_out


def samples(config: Config, sets: Sets) -> list[Sample]:
    """A row of each set, then the next of each: when time runs out, every set has been tried.

    DataError for a row that no prompt can be made of.
    """
    several = len(set_keys(config)) > 1
    if are_plain(config, sets):
        found = [[_plain(row, key if several else "") for row in rows] for key, rows in sets.items()]
    else:
        from penstock_launch.check.prompts import encoded

        prompts = encoded(config, sets)
        found = [
            [_sample(*pair, key if several else "") for pair in zip(rows, prompts[key], strict=True)]
            for key, rows in sets.items()
        ]
    return [sample for nth in zip_longest(*found) for sample in nth if sample is not None]


def _plain(row: Row, key: str) -> Sample:
    return Sample(row.place, str(row.prompt), row.answer, row.reward, row.metadata, key)


def _sample(row: Row, prompt: EncodedPrompt, key: str) -> Sample:
    """With the prompt after the chat template."""
    return Sample(row.place, prompt.text, prompt.answer, prompt.reward, prompt.metadata, key)


def are_plain(config: Config, sets: Sets) -> bool:
    """Only a chat template or an environment changes a prompt; for plain text no tokenizer is loaded."""
    data, training = config.data, [each.section for each in config.data.training_sets]
    templates = [
        *(data.system_prompt, data.prompt_template),
        *(text for each in training for text in (each.system_prompt, each.prompt_template)),
        *(text for each in config.held_out_sets for text in (each.system_prompt, each.prompt_template)),
    ]
    changed = config.agent.enabled or any(templates)
    return not changed and all(isinstance(row.prompt, str) for rows in sets.values() for row in rows)

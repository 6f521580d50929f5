"""The rows of a run's held-out sets, each with the reward that scores it."""

from dataclasses import replace

from penstock.config import Config, HeldOutSet
from penstock_trainer.data.datasets import load_rows
from penstock_trainer.data.rows import Row, require_rewards


def load_held_out(config: Config) -> dict[str, list[Row]]:
    """By name of the set, the main one first; DataError if a row is bad, or names a reward that no function gives."""
    return {each.name: rows_of(each, config) for each in config.held_out_sets}


def rows_of(held_out: HeldOutSet, config: Config, size: int | None = None) -> list[Row]:
    """The rows of a set, or the first `size` of them; those that name no reward name that of the set."""
    dataset = held_out.dataset
    if size is not None:
        dataset = dataset.model_copy(update={"size": min(dataset.size or size, size)})
    return with_rewards_of(held_out, config, load_rows(dataset, held_out.key, of_episodes=config.agent.enabled))


def with_rewards_of(held_out: HeldOutSet, config: Config, rows: list[Row]) -> list[Row]:
    """Rows of a set, each with the name of its reward; DataError if no function gives it."""
    require_rewards(rows, {**config.all_rewards.functions, **held_out.functions}, held_out.functions_key)
    return [row if row.reward else replace(row, reward=held_out.reward) for row in rows]

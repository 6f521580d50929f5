"""Five prompts that are known by their numbers, and the configuration of a run that draws from them."""

from typing import Any

from penstock.config import Config
from penstock_trainer.data.prompts import EncodedPrompt

PROMPTS = [EncodedPrompt(f"p{n}", (n, n + 1), f"a{n}", "", {"n": n}) for n in range(5)]


def config(**changes: Any) -> Config:
    base: dict[str, Any] = {
        "run": {"seed": 3},
        "actor": {"path": "m", "group_size": 4},
        "data": {"train": {"path": "d"}},
        "total_train_epochs": 3,
    }
    return Config.model_validate(base | changes)

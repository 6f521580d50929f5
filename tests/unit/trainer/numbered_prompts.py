"""Five prompts that are known by their numbers, and the configuration of a run that draws from them."""

from collections.abc import Sequence
from typing import Any

from penstock.config import Config, DatasetSection, EvalSampling, HeldOutSet
from penstock.contracts import Sampling
from penstock_trainer.data.prompts import EncodedPrompt
from penstock_trainer.rollouts.evaluation import EvalSet

PROMPTS = [EncodedPrompt(f"p{n}", (n, n + 1), f"a{n}", "", {"n": n}) for n in range(5)]


def config(**changes: Any) -> Config:
    base: dict[str, Any] = {
        "run": {"seed": 3},
        "actor": {"path": "m", "group_size": 4},
        "data": {"train": {"path": "d"}},
        "total_train_epochs": 3,
    }
    return Config.model_validate(base | changes)


def eval_set(
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    sampled: EvalSampling,
    *,
    name: str = "main",
    num_trained: int = 0,
) -> EvalSet:
    """A held-out set of these prompts."""
    key = "data.eval" if name == "main" else f"eval.sets.{name}"
    dataset = DatasetSection(path="d")
    held_out = HeldOutSet(
        name=name, key=key, dataset=dataset, sampling=sampled, system_prompt="", prompt_template="", functions={}
    )
    return EvalSet(held_out, prompts, sampling, num_trained)

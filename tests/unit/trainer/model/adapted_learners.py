"""Learners of a tiny model with an adapter, and their weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.config import Config
from penstock_trainer.learner.learner import Learner
from tests.unit.trainer.trainer_groups import config_for, example_groups

RANK, ALPHA = 3, 12


def lora_config(folder: Path, *, kl_ctl: float = 0.0, seed: int = 0, **lora: Any) -> Config:
    actor = {"path": str(folder), "dtype": "float32", "lora": {"rank": RANK, "alpha": ALPHA, **lora}}
    optimizer = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 2}
    return config_for(folder, actor=actor, kl_ctl=kl_ctl, optimizer=optimizer, run={"seed": seed})


def trained(config: Config, num_steps: int = 3) -> Learner:
    learner = Learner(config)
    for step in range(num_steps):
        assert learner.update(example_groups(seed=step), version=0).changed
    return learner


def copies(learner: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in learner.weights().items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(
        torch.equal(left[name].view(torch.int32), right[name].view(torch.int32)) for name in left
    )


def adapter_weights(learner: Learner) -> dict[str, Tensor]:
    return {
        name.removeprefix("model."): tensor.clone()
        for name, tensor in learner.state().items()
        if name.startswith("model.")
    }

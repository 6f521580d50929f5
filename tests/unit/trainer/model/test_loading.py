"""Models whose trainer would compute another function than the sampler: made the same, or refused."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    Starcoder2Config,
)

from penstock.errors import ConfigError
from penstock_trainer.batching.packing import pack_of_sequence
from penstock_trainer.learner.learner import Learner
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.pack_model import PackModel
from tests.unit.trainer.trainer_groups import config_for, example_groups, save_tiny_model

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 40}
WITH_RANDOMNESS = {
    "dropout of embeddings and residuals": Starcoder2Config(
        **GROUPED, embedding_dropout=0.5, residual_dropout=0.5, attention_dropout=0.5, sliding_window=None
    ),
    "dropout by a number": OPTConfig(**SHAPE, ffn_dim=40, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5),
    "jitter of a router": MixtralConfig(**GROUPED, num_local_experts=4, router_jitter_noise=0.5),
}
REFUSED = {
    "dropout of the configuration": FalconConfig(**SHAPE, hidden_dropout=0.5, alibi=False),
    "experts drawn at random": PhimoeConfig(
        **GROUPED, num_local_experts=4, initializer_range=0.3, router_jitter_noise=5.0
    ),
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1\n"


def weights_file(folder: Path) -> Path:
    return folder / "model.safetensors"


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a pointer of git lfs": lambda folder: weights_file(folder).write_bytes(LFS_POINTER),
    "cut off": lambda folder: weights_file(folder).write_bytes(weights_file(folder).read_bytes()[:3000]),
    "a text as number": partial(change_config, vocab_size="many"),
    "no heads": partial(change_config, num_attention_heads=0),
    "an unknown activation": partial(change_config, hidden_act="nothing"),
    "quantized, of a missing library": partial(change_config, quantization_config={"quant_method": "awq", "bits": 4}),
    "quantized": partial(change_config, quantization_config={"quant_method": "fp8"}),
}


def save(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", WITH_RANDOMNESS.values(), ids=WITH_RANDOMNESS)
def test_recomputed_activations_are_those_of_a_single_pass(config: PreTrainedConfig, tmp_path: Path) -> None:
    folder = str(save(config, tmp_path))
    pack = pack_of_sequence([3, 5, 7, 9, 11, 13, 4, 6])
    logprobs = [
        PackModel(
            load_model(folder, "actor.path"), dtype=torch.float32, temperature=1.0, gradient_checkpointing=recomputes
        ).token_logprobs(pack)[0]
        for recomputes in (False, True)
    ]
    torch.testing.assert_close(logprobs[0], logprobs[1])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_folder_that_cannot_be_used_is_one_clear_error(damage: Callable[[Path], object], tmp_path: Path) -> None:
    damage(save_tiny_model(tmp_path))
    with pytest.raises(ConfigError, match=r"^actor\.path is .*expected (a causal language model|float32)"):
        load_model(str(tmp_path), "actor.path")


@pytest.mark.parametrize("config", REFUSED.values(), ids=REFUSED)
def test_a_model_that_stays_random_in_training_mode_is_refused(config: PreTrainedConfig, tmp_path: Path) -> None:
    folder = save(config, tmp_path)
    actor = {"path": str(folder), "dtype": "float32"}
    assert Learner(config_for(folder, actor=actor)).update(example_groups(), version=0).changed
    with pytest.raises(ConfigError, match=r"training mode.*actor\.gradient_checkpointing to false"):
        Learner(config_for(folder, actor=actor | {"gradient_checkpointing": True}))


def test_frequencies_that_depend_on_the_longest_sequence_of_a_pack_are_refused(tmp_path: Path) -> None:
    config = Phi3Config(**GROUPED, pad_token_id=0, original_max_position_embeddings=16, rope_parameters=LONGROPE)
    folder = save(config, tmp_path)
    with pytest.raises(ConfigError, match=r"longrope.*context_length of at most 16; it is 64"):
        Learner(config_for(folder))
    engine = {"dtype": "float32", "context_length": 16}
    assert Learner(config_for(folder, rollout={"engine": engine})).update(example_groups(), version=0).changed

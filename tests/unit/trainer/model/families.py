"""Tiny random models of families that differ in how they mix tokens, and in their experts."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from tests.unit.trainer.trainer_groups import SHAPE

NUM_EXPERTS = 6
TOP_K = 3  # more than two: the order of their sum can differ
EXPERTS: dict[str, Any] = {
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

MIXTURES: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **EXPERTS, tie_word_embeddings=False),
    "qwen3_moe with a dense layer": Qwen3MoeConfig(**SHAPE, **EXPERTS, mlp_only_layers=[0], tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, sliding_window=None),
    "olmoe": OlmoeConfig(
        **{**SHAPE, "head_dim": 6}, num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=False
    ),
}
HYBRIDS: dict[str, PreTrainedConfig] = {
    "qwen3_next": Qwen3NextConfig(
        **SHAPE, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16, decoder_sparse_step=1
    ),
    "qwen3_5": Qwen3_5TextConfig(**SHAPE, **LINEAR, tie_word_embeddings=True),
    "qwen3_5_moe": Qwen3_5MoeTextConfig(**SHAPE, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16),
}
WINDOWS: dict[str, PreTrainedConfig] = {"mistral": MistralConfig(**SHAPE, sliding_window=4)}
FAMILIES = {**MIXTURES, **HYBRIDS, **WINDOWS}


def family(name: str, seed: int = 3) -> PreTrainedModel:
    """A random model, as transformers makes it."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(FAMILIES[name])
    model.float().eval()
    return model


def save_family(name: str, folder: Path) -> Path:
    """Its folder, in the form of published checkpoints."""
    family(name).save_pretrained(folder)
    return folder

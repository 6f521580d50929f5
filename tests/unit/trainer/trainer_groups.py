"""Builds scored groups and tiny random models for the trainer's tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    pack_float32,
    pack_int32,
)

VOCAB_SIZE = 48
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(kind: str = "llama") -> PreTrainedModel:
    """A random model: `llama` ties its embeddings, `qwen3` does not."""
    torch.manual_seed(7)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False))


def save_tiny_model(folder: Path, kind: str = "llama") -> Path:
    tiny_model(kind).save_pretrained(folder)
    return folder


def config_for(folder: Path, **changes: object) -> Config:
    """A configuration with float32 everywhere; `changes` replace full sections."""
    sections: dict[str, object] = {
        "actor": {"path": str(folder), "dtype": "float32"},
        "data": {"train": {"path": "unused.jsonl"}},
        "rollout": {"engine": {"dtype": "float32"}},
        "optimizer": {"lr": 1e-3},
    }
    return Config.model_validate(sections | changes)


def completion(token_ids: Sequence[int], logprobs: Sequence[float], mask: Sequence[int] | None = None) -> Completion:
    span = VersionSpan(PolicyIdentity(0, "0" * 16), 0, len(token_ids))
    return Completion(
        token_ids=pack_int32(token_ids),
        loss_mask=None if mask is None else bytes(mask),
        logprobs=pack_float32(logprobs),
        spans=(span,),
        text="",
        finish_reason="stop",
    )


def scored_group(
    number: int, prompt_ids: Sequence[int], completions: Sequence[Completion], rewards: Sequence[float | None]
) -> ScoredGroup:
    ticket = Ticket(
        purpose="train",
        number=number,
        attempt=0,
        policy_version=0,
        prompt="",
        prompt_ids=pack_int32(prompt_ids),
        seeds=tuple(range(len(completions))),
        sampling=Sampling(1.0, 8, (2,)),
        answer="",
        reward="",
        metadata={},
    )
    scores = tuple(Score(None, "timeout") if value is None else Score(value) for value in rewards)
    return ScoredGroup(RolloutGroup(ticket, tuple(completions), "server", 0.0, 1.0), scores)


def example_groups(num_groups: int = 4, group_size: int = 4, seed: int = 0) -> list[ScoredGroup]:
    """Groups with a common few-shot prefix, ragged and repeated completions, and gaps in the loss mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()

    few_shot = draw(5)
    groups = []
    for number in range(num_groups):
        prompt_ids = few_shot + draw(2 + number % 3)
        completions = []
        for index in range(group_size):
            token_ids = draw(1 + (index + number) % 4)
            mask = [1] * len(token_ids)
            if len(mask) > 2:
                mask[1] = 0
            behaviour = (-3.8 + 0.5 * torch.randn(len(token_ids), generator=generator)).tolist()
            completions.append(completion(token_ids, behaviour, mask))
        completions[1] = completions[0]
        rewards = torch.randn(group_size, generator=generator).tolist()
        groups.append(scored_group(number, prompt_ids, completions, rewards))
    return groups

"""Models with random weights in the shapes that people train, and how much a step has to compute.

Owns the shapes (no hub: their sizes are written here) and the count of floating-point operations. Weights do not change
how long a step takes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.learner_cases import GROUP_SIZE, Case
from penstock_trainer.batching.packing import Pack

CONTEXT = 4096
QWEN_VOCABULARY = 151936


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the prompts of a batch for it: about a second of an H100's work."""

    name: str
    config: PreTrainedConfig
    num_prompts: int


def shapes(*, cpu: bool) -> tuple[Shape, ...]:
    """From small to large, so that little time gives the small ones; on a CPU one that takes milliseconds."""
    if cpu:
        return (Shape("tiny", _sized(LlamaConfig, 40960, 64, 128, 2, 4, 2), 1),)
    return (
        # The families of SmolLM2 and Qwen2.5.
        Shape("135M", _sized(LlamaConfig, 49152, 576, 1536, 30, 9, 3), 64),
        Shape("0.5B", _sized(Qwen2Config, QWEN_VOCABULARY, 896, 4864, 24, 14, 2), 32),
        Shape("1.5B", _sized(Qwen2Config, QWEN_VOCABULARY, 1536, 8960, 28, 12, 2), 16),
    )


def _sized(
    family: type[LlamaConfig | Qwen2Config],
    vocabulary: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    key_heads: int,
) -> PreTrainedConfig:
    return family(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )


def save_random(shape: Shape, folder: Path, device: str) -> Path:
    """A model of that shape in `folder`, for `from_pretrained`; a GPU, as `device`, draws its numbers faster."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Work:
    """What a step computes. rows: tokens through the layers; pairs: (row, row it looks at); head_rows: projected rows.

    The operations of matrix products, each multiplication and each addition counted:

        3 (2 N rows + 4 L H d pairs + 2 D V head_rows)

    N: weights of the layers' matrices, L layers, H heads of size d, D hidden size, V vocabulary. 3: the backward pass
    computes twice what the forward pass does. What is computed again (checkpointing, a head in chunks) is not counted.
    """

    rows: int
    pairs: int
    head_rows: int

    def flops(self, config: PreTrainedConfig) -> float:
        sizes = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = sum(each.numel() for each in model.model.layers.parameters() if each.ndim >= 2)
        head_size = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
        attention = 4 * sizes.num_hidden_layers * sizes.num_attention_heads * head_size * self.pairs
        head = 2 * sizes.hidden_size * sizes.vocab_size * self.head_rows
        return 3.0 * float(2 * layers * self.rows + attention + head)


def asked_work(case: Case) -> Work:
    """Every sequence by itself, without padding: what a user asks for, whatever computes it."""
    lengths = [
        len(prompt) + len(ids) for prompt, group in zip(case.prompts, case.completions, strict=True) for ids in group
    ]
    assert len(lengths) == GROUP_SIZE * len(case.prompts)
    return Work(sum(lengths), sum(each * (each + 1) // 2 for each in lengths), case.num_loss_tokens)


def packed_work(packs: Iterable[Pack]) -> Work:
    """Of packs: each distinct prefix once."""
    works = [(pack.num_rows, int((pack.positions_P + 1).sum()), pack.parents_R.numel()) for pack in packs]
    return Work(*(sum(column) for column in zip(*works, strict=True)))

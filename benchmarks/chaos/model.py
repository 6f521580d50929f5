"""A two-layer random Llama with a tokenizer of letters, and prompts for it.

Owns what the runs are made of: small enough that a step takes milliseconds, real enough for SGLang and the trainer.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789+=?\n"
SPECIAL = ("<unk>", "<end>", "<pad>")


def save_tokenizer(folder: Path) -> int:
    """43 tokens, one per character; returns their number."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<end>", pad_token="<pad>"
    ).save_pretrained(folder)
    return len(vocabulary)


def make_tiny_model(folder: Path) -> None:
    """The same bytes at every call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_prompts(
    path: Path, count: int, pace_file: Path, further: Callable[[int], Mapping[str, str]] = lambda number: {}
) -> None:
    """Write meaningless sums; the reward reads from `pace_file` how slow to be. further: more metadata of a row."""
    rows = [
        {"prompt": f"{i}+{7 * i % 10}=", "answer": "", "metadata": {"pace_file": str(pace_file), **further(i)}}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

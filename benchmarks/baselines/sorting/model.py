"""The model of the sorting task: Qwen3's shape with 0.4M parameters, warmed up on demonstrations.

Owns the model's folder. Invariant: one seed and one form give the same weights on the same machine.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.baselines.sorting.task import END, VOCABULARY_SIZE, draw_demonstration, ids_of

WARM_UP_STEPS = 800
WARM_UP_BATCH = 128
WARM_UP_LR = 1e-3
IGNORED = -100  # no target, for cross_entropy


def make_model() -> Qwen3ForCausalLM:
    """With random weights of torch's global generator."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=END,
            dtype="float32",
        )
    )


def warmed_up(folder: Path, seed: int = 0) -> Path:
    """The folder of the warmed-up model; made once."""
    target = folder / f"sorting-{seed}-{_form()}"
    if not (target / "config.json").exists():
        torch.manual_seed(seed)
        model = make_model()
        _train(model, np.random.default_rng(seed))
        partial = target.with_suffix(".partial")
        model.save_pretrained(partial)
        partial.rename(target)
    return target


def _form() -> str:
    """A digest of what the weights depend on."""
    source = Path(__file__).read_bytes() + (Path(__file__).parent / "task.py").read_bytes()
    return hashlib.sha256(source).hexdigest()[:8]


def _train(model: Qwen3ForCausalLM, generator: np.random.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_LR, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * _fall(step))
    for _ in range(WARM_UP_STEPS):
        ids_BT, target_BT = _batch(generator)
        logits_BTV = model(input_ids=ids_BT).logits
        loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1), target_BT[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _fall(step: int) -> float:
    return 1.0 - 0.9 * step / WARM_UP_STEPS


def _batch(generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Ids and targets int64[B, T] of demonstrations; only answers are targets. The right is filled with the end."""
    pairs = [draw_demonstration(generator) for _ in range(WARM_UP_BATCH)]
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = np.full((WARM_UP_BATCH, longest), END, dtype=np.int64)
    targets = np.full((WARM_UP_BATCH, longest), IGNORED, dtype=np.int64)
    for row, (prompt, answer) in enumerate(pairs):
        whole = ids_of(prompt + answer)
        ids[row, : len(whole)] = whole
        targets[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return torch.from_numpy(ids), torch.from_numpy(targets)

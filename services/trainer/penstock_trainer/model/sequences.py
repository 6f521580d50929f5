"""A pack computed sequence by sequence, for models that cannot see a tree.

A recurrent layer carries a state from token to token, a window counts tokens: neither sees a trie by a mask. Such a
model gets packs without shared prefixes. Their sequences are the rows of a batch, padded at the end. So each is
computed by the model's own code, as if it were alone: no causal layer looks ahead, and padding is behind all tokens.

Shapes: P rows of a pack, S sequences, T tokens of the longest, D hidden size.
"""

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

FULL_ATTENTION = {"full_attention", "attention"}


def unshareable_layers(model: PreTrainedModel) -> str:
    """The layers that keep the model from packs with shared prefixes, in words; empty if there are none."""
    text = model.config.get_text_config()
    types: list[str] = list(getattr(text, "layer_types", None) or ())
    if others := sorted(set(types) - FULL_ATTENTION):
        return ", ".join(others)
    window = getattr(text, "sliding_window", None)
    if window and not types and getattr(text, "use_sliding_window", True):
        return f"attention limited to {window} tokens"
    chunk = getattr(text, "attention_chunk_size", None)
    return f"attention limited to {chunk} tokens" if chunk else ""


def padded_rows(positions_P: Tensor) -> Tensor:
    """int64[P]: where each row is in the flat batch [S * T]. RuntimeError if two sequences share a row."""
    starts_S = torch.nonzero(positions_P == 0).flatten()
    row_P = torch.arange(positions_P.numel(), device=positions_P.device)
    sequence_P = torch.cumsum(positions_P == 0, 0) - 1
    if not torch.equal(row_P - starts_S[sequence_P], positions_P):
        raise RuntimeError("a pack of shared prefixes for a model that computes each sequence by itself")
    return sequence_P * (int(positions_P.max()) + 1) + positions_P


def sequence_hidden_states(model: PreTrainedModel, token_ids_P: Tensor, rows_P: Tensor, num_tokens: int) -> Tensor:
    """[P, D]. rows_P: `padded_rows`; num_tokens: T."""
    num_sequences = int(rows_P.max()) // num_tokens + 1
    ids = token_ids_P.new_zeros(num_sequences * num_tokens).index_copy_(0, rows_P, token_ids_P)
    output = model.base_model(input_ids=ids.view(num_sequences, num_tokens), use_cache=False)
    return cast(Tensor, output.last_hidden_state.flatten(0, 1).index_select(0, rows_P))

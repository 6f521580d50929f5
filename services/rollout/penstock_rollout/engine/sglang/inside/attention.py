"""Attention on a CPU for all sequences of a batch at once, instead of SGLang's loop over them.

SGLang's `torch_native` backend calls the attention operator once per sequence and layer, and its prefill computes the
queries of the cached prefix again. With short sequences this takes longer than the matrix products. Here the sequences
are padded to the longest and masked, which gives the same sums. SGLang's own code computes everything but plain causal
self-attention, and batches whose padding would cost more than is gained.

Runs inside SGLang's scheduler; `launcher` registers it in SGLang's hook registry.

Shapes: B sequences, T query tokens of all sequences, H heads, K key-value heads, R = H / K, Q longest query,
S longest sequence, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

BACKEND = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
MAX_SCORES = 2**22  # B * Q * S; above this, each sequence by itself keeps the core busy
MAX_PADDED_TOKENS = 2**16  # B * S; bounds the copy of keys and values

Hook = Callable[..., torch.Tensor]


def hooks() -> dict[str, Hook]:
    """The hooks around SGLang's methods, by their full names."""
    return {f"{BACKEND}._run_sdpa_forward_decode": decode, f"{BACKEND}._run_sdpa_forward_extend": extend}


def decode(
    original: Hook,
    backend: Any,
    query_THD: torch.Tensor,
    output_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """One new token per sequence."""
    num_sequences, longest = seq_lens.shape[0], int(seq_lens.max())
    if not _plain(query_THD, k_cache, encoder_lens, options) or num_sequences * longest > MAX_PADDED_TOKENS:
        return original(
            backend, query_THD, output_THD, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, encoder_lens,
            **options,
        )  # fmt: skip
    slots_BS = req_to_token[req_pool_indices, :longest]
    mask_BS = torch.arange(longest) < seq_lens[:, None]
    query_BQHD = query_THD[:, None]
    output_THD.copy_(_attend(query_BQHD, k_cache, v_cache, slots_BS, mask_BS[:, None], options["scaling"])[:, 0])
    return output_THD


def extend(
    original: Hook,
    backend: Any,
    query_THD: torch.Tensor,
    output_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Several new tokens per sequence, after a cached prefix of any length."""
    num_sequences, longest, longest_query = seq_lens.shape[0], int(seq_lens.max()), int(extend_seq_lens.max())
    fits = num_sequences * longest <= MAX_PADDED_TOKENS and num_sequences * longest * longest_query <= MAX_SCORES
    if not (fits and options["causal"] and _plain(query_THD, k_cache, encoder_lens, options)):
        return original(
            backend, query_THD, output_THD, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
            extend_prefix_lens, extend_seq_lens, encoder_lens, **options,
        )  # fmt: skip
    present_BQ = torch.arange(longest_query) < extend_seq_lens[:, None]
    query_BQHD = query_THD.new_zeros((num_sequences, longest_query, *query_THD.shape[1:]))
    query_BQHD[present_BQ] = query_THD
    position_BQ = extend_prefix_lens[:, None] + torch.arange(longest_query)
    mask_BQS = torch.arange(longest) <= position_BQ[..., None]
    slots_BS = req_to_token[req_pool_indices, :longest]
    output_BQHD = _attend(query_BQHD, k_cache, v_cache, slots_BS, mask_BQS, options["scaling"])
    output_THD.copy_(output_BQHD[present_BQ])
    return output_THD


def _plain(query: torch.Tensor, k_cache: torch.Tensor, encoder_lens: Any, options: dict[str, Any]) -> bool:
    return (
        encoder_lens is None
        and not options["is_cross_attn"]
        and options["sliding_window_size"] is None
        and query.dtype == k_cache.dtype
    )


def _attend(
    query_BQHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots_BS: torch.Tensor,
    mask_BQS: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attention of padded queries over gathered keys; the R heads that share keys are rows of one matrix product."""
    B, Q, H, D = query_BQHD.shape
    K = k_cache.shape[1]
    R = H // K
    rows = query_BQHD.view(B, Q, K, R, D).permute(0, 2, 3, 1, 4).reshape(B, K, R * Q, D)
    mask = mask_BQS[:, None, None].expand(B, 1, R, Q, slots_BS.shape[1]).reshape(B, 1, R * Q, -1)
    keys, values = k_cache[slots_BS].transpose(1, 2), v_cache[slots_BS].transpose(1, 2)
    attended = scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scaling)
    return attended.view(B, K, R, Q, -1).permute(0, 3, 1, 2, 4).reshape(B, Q, H, -1)

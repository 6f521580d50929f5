"""Prefill on a CPU that computes equal sequences of a batch only once.

The G requests of a group have the same prompt, so SGLang computes the same rows G times: at least those of the last
prompt token, which is never cached. Here one sequence of each kind goes through the model, and its logits and its new
keys and values are copied to the others. Each sequence is still sampled by itself, from the same logits. SGLang's own
code computes any other batch, and any batch with a field whose rows are unclear.

Runs inside SGLang's scheduler; `launcher` registers it in SGLang's hook registry.

Shapes: B sequences, U of them distinct, T new tokens of all sequences.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

Hook = Callable[..., Any]

# These fields do not have one row per sequence or token; `_select` computes them anew.
TOTALS = {"batch_size", "seq_lens_sum", "extend_num_tokens", "extend_start_loc"}
SHARED = {"sampling_info"}  # used after the pass, and for all sequences


def hooks() -> dict[str, Hook]:
    """The hooks around SGLang's methods, by their full names."""
    return {"sglang.srt.model_executor.runner.eager_runner.EagerRunner.execute": execute}


def execute(original: Hook, runner: Any, forward_batch: Any, *arguments: Any, **options: Any) -> Any:
    """Run one forward pass, over the distinct sequences only if the batch is a plain prefill."""
    pool = getattr(runner.model_runner, "token_to_kv_pool", None)
    if _records_experts() or not (_plain(forward_batch) and hasattr(pool, "k_buffer") and hasattr(pool, "v_buffer")):
        return original(runner, forward_batch, *arguments, **options)
    kept_U, kind_B = _kinds(forward_batch, runner.model_runner.req_to_token_pool.req_to_token)
    if len(kept_U) == len(kind_B):
        return original(runner, forward_batch, *arguments, **options)
    token_rows = _token_rows(forward_batch.extend_seq_lens_cpu)
    distinct = _select(forward_batch, kept_U, token_rows)
    if distinct is None:
        return original(runner, forward_batch, *arguments, **options)
    output = original(runner, distinct, *arguments, **options)
    output.next_token_logits = output.next_token_logits[torch.tensor(kind_B)]
    source = [row for kind in kind_B for row in token_rows[kept_U[kind]]]
    _copy_keys_and_values(pool, forward_batch.out_cache_loc, torch.tensor(source))
    return output


def _records_experts() -> bool:
    """Whether SGLang records the experts of each row: it would find none of the sequences that are left out."""
    capturer = sys.modules.get("sglang.srt.state_capturer.routed_experts")
    return capturer is not None and capturer.get_global_experts_capturer() is not None


def _plain(batch: Any) -> bool:
    """Whether the batch is a prefill whose only result is the next token's logits."""
    return bool(
        batch.forward_mode.is_extend()
        and not batch.forward_mode.is_mixed()
        and batch.spec_info is None
        and not batch.capture_hidden_mode.need_capture()
        and not (
            batch.return_logprob
            and any(n > start for n, start in zip(
                batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu, strict=True
            ))
        )
    )  # fmt: skip


def _kinds(batch: Any, req_to_token: torch.Tensor) -> tuple[list[int], list[int]]:
    """The first sequence of each kind, and the kind of each sequence. Two sequences are of one kind if their cached
    slots and their new tokens are equal.
    """
    tokens = batch.input_ids.tolist()
    kinds: dict[tuple[object, ...], int] = {}
    kept_U: list[int] = []
    kind_B: list[int] = []
    start = 0
    rows = zip(batch.req_pool_indices.tolist(), batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True)
    for sequence, (request, num_cached, num_new) in enumerate(rows):
        key = (num_cached, req_to_token[request, :num_cached].numpy().tobytes(), *tokens[start : start + num_new])
        start += num_new
        kind = kinds.setdefault(key, len(kept_U))
        if kind == len(kept_U):
            kept_U.append(sequence)
        kind_B.append(kind)
    return kept_U, kind_B


def _token_rows(lengths: Sequence[int]) -> list[range]:
    """The rows of each sequence's new tokens."""
    rows, start = [], 0
    for length in lengths:
        rows.append(range(start, start + length))
        start += length
    return rows


def _select(batch: Any, kept_U: list[int], token_rows: list[range]) -> Any:
    """The batch with only these sequences; None if the rows of a field are neither sequences nor tokens."""
    num_sequences, num_tokens = len(token_rows), token_rows[-1].stop
    kept_rows = {
        num_sequences: torch.tensor(kept_U),  # if both counts are equal, so are the rows
        num_tokens: torch.tensor([row for sequence in kept_U for row in token_rows[sequence]]),
    }
    lengths = torch.tensor([len(token_rows[sequence]) for sequence in kept_U])
    changed: dict[str, Any] = {
        "batch_size": len(kept_U),
        "seq_lens_sum": int(batch.seq_lens[kept_U].sum()),
        "extend_num_tokens": int(lengths.sum()),
        "extend_start_loc": (lengths.cumsum(0) - lengths).to(batch.extend_start_loc.dtype),
    }
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if field.name in TOTALS or field.name in SHARED:
            continue
        if isinstance(value, torch.Tensor) and value.numel() > 0 and value.dim() > 0:
            if value.shape[0] not in kept_rows:
                return None
            changed[field.name] = value[kept_rows[value.shape[0]]]
        elif isinstance(value, list):
            if len(value) != num_sequences:
                return None
            changed[field.name] = [value[sequence] for sequence in kept_U]
    return dataclasses.replace(batch, **changed)


def _copy_keys_and_values(pool: Any, slots_T: torch.Tensor, source_T: torch.Tensor) -> None:
    """Copy to every new token the keys and values of the token that was computed in its place."""
    computed = slots_T[source_T]
    copies = slots_T != computed
    target, computed = slots_T[copies], computed[copies]
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer[target] = buffer[computed]

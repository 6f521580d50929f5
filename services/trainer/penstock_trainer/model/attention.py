"""Exact attention over a trie pack at the cost of ancestors only.

Owns how a transformers model attends while it computes a pack: a function registered with its attention interface, with
one `TrieAttention` per pack that all layers share. Invariant: equal to SDPA with the dense mask of `trie_mask`, forward
and backward, up to rounding. Without a TrieAttention the function is plain SDPA.

Preorder makes it simple. A segment is a range of rows with one subtree_end, thus a chain; its descendants are the range
of rows right behind it. So the mask consists of rectangles of consecutive rows, and no rows need to be gathered:

    segment [start, stop) with subtree end       rows  start  stop        end
      itself, causal         self piece            |  \\ self |
      descendants see it all cross piece           |         |   cross: queries [stop, end), keys [start, stop)

Each piece is one call of the CPU's flash kernel. Pieces of a row are merged by their log-sum-exp, and the backward
kernel, given the merged output and log-sum-exp, returns each piece's exact share of the gradients. On a GPU the same
mask goes to FlexAttention, which skips blocks that are fully masked.

Shapes: P rows of a pack, H query heads, K key heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from penstock_trainer.model.attention_plan import Piece, plan_pieces

NAME = "penstock_trie"
MOST_GRAPHS = 64  # of attention: far more than any model makes


def trie_mask(subtree_end_P: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention mask [1, 1, P, P] to add: 0 if row i may look at row j, else the lowest value of dtype."""
    row_P = torch.arange(subtree_end_P.numel(), device=subtree_end_P.device)
    seen_PP = (row_P[None, :] <= row_P[:, None]) & (row_P[:, None] < subtree_end_P[None, :])
    mask_PP = torch.zeros(seen_PP.shape, dtype=dtype, device=seen_PP.device)
    return mask_PP.masked_fill_(~seen_PP, torch.finfo(dtype).min)[None, None]


@dataclass(frozen=True)
class TrieAttention:
    """Which rows of one pack attend to which; made once and used by every layer.

    pieces: for the CPU, with a mask for those that are neither causal nor full. blocks: for a GPU.
    """

    pieces: tuple[tuple[Piece, Tensor | None], ...] = ()
    blocks: BlockMask | None = None

    @classmethod
    def of(cls, subtree_end_P: Tensor) -> "TrieAttention":
        """The attention of a pack, on the pack's device."""
        if subtree_end_P.device.type == "cpu":
            return cls(pieces=_with_masks(plan_pieces(subtree_end_P.tolist()), subtree_end_P))
        return cls(blocks=_block_mask(subtree_end_P))


def _with_masks(pieces: list[Piece], subtree_end_P: Tensor) -> tuple[tuple[Piece, Tensor | None], ...]:
    def mask(piece: Piece) -> Tensor | None:
        if piece.kind != "masked":
            return None
        rows = slice(piece.query_start, piece.query_stop)
        return trie_mask(subtree_end_P[rows] - piece.query_start, torch.float32)

    return tuple((piece, mask(piece)) for piece in pieces)


def _block_mask(subtree_end_P: Tensor) -> BlockMask:
    num_rows = subtree_end_P.numel()

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end_P[key])

    # Compiled, it never makes the dense [P, P] mask; the eager form serves tests on a CPU.
    make = create_block_mask if subtree_end_P.device.type == "cpu" else _compiled_mask()
    with torch.no_grad():  # always, so that both gradient modes have one graph
        return cast(BlockMask, make(sees, None, None, num_rows, num_rows, device=subtree_end_P.device))


@cache
def _compiled_mask() -> Callable[..., Any]:
    return torch.compile(create_block_mask)


@cache
def _compiled_attention() -> Callable[..., Tensor]:
    """FlexAttention by torch.compile; an error instead of its eager form, which computes dense [H, P, P] scores.

    There is a graph for each kind of length (1, up to 128, more, and the first one of all), each gradient mode, each
    type and head size, and each choice of inputs that need a gradient: more than torch's limit of 8 if the reference
    is of another shape, or an adapter is on queries alone.
    """
    compiled = cast(Callable[..., Tensor], torch.compile(flex_attention, fullgraph=True))

    def attend(*args: Any, **kwargs: Any) -> Tensor:
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS):  # of this thread only
            return compiled(*args, **kwargs)

    return attend


def use_trie_attention(model: PreTrainedModel) -> None:
    """Make the model attend by `TrieAttention`. A model without an attention interface keeps the dense mask."""
    if not model._can_set_attn_implementation():
        return
    ALL_ATTENTION_FUNCTIONS.register(NAME, cast(Any, trie_attention))
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention_arguments(model: PreTrainedModel, subtree_end_P: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Keywords of a model's forward call that make it attend over a pack."""
    if model.config._attn_implementation != NAME:
        return {"attention_mask": trie_mask(subtree_end_P, dtype)}
    # A mask with four dimensions counts as finished: transformers makes none of its own. A model that does not pass
    # `trie` on adds these zeros, so every row attends to every other; the check at loading detects that.
    shape = (1, 1, 1, subtree_end_P.numel())
    no_mask = torch.zeros(shape, dtype=dtype, device=subtree_end_P.device)
    return {"attention_mask": no_mask, "trie": TrieAttention.of(subtree_end_P)}


def trie_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    trie: TrieAttention | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, P, D], key and value [1, K, P, D]; the output is [1, P, H, D].

    Each model passes the keyword `trie` of its own call down to here.
    """
    if trie is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Under autocast, rotary embeddings leave queries and keys in float32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if trie.blocks is not None:
        attend = _compiled_attention() if query.is_cuda else cast(Callable[..., Tensor], flex_attention)
        return attend(query, key, value, block_mask=trie.blocks, scale=scale).transpose(1, 2).contiguous(), None
    value_size = value.shape[-1]
    value = F.pad(value, (0, query.shape[-1] - value_size))  # the kernel needs one size
    piecewise = cast(Callable[..., Tensor], _PiecewiseAttention.apply)
    return piecewise(query, key, value, trie.pieces, scale)[..., :value_size], None


class _PiecewiseAttention(torch.autograd.Function):
    """softmax(scale q k' + mask) v, with the mask given as pieces that hold every pair once. Returns [1, P, H, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pieces: tuple[tuple[Piece, Tensor | None], ...],
        scale: float,
    ) -> Tensor:
        output, normalizer = _attend(query, key, value, pieces, scale)
        ctx.save_for_backward(query, key, value, output, normalizer)
        ctx.pieces, ctx.scale = pieces, scale
        return output.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PHD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normalizer = ctx.saved_tensors
        grads = [torch.empty_like(each, dtype=torch.float32) for each in (query, key, value)]
        grad = grad_PHD.transpose(1, 2)
        for piece, mask in ctx.pieces:
            rows, seen = slice(piece.query_start, piece.query_stop), slice(piece.key_start, piece.key_stop)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, rows],
                query[:, :, rows],
                key[:, :, seen],
                value[:, :, seen],
                output[:, :, rows],
                normalizer[:, :, rows],
                0.0,
                piece.kind == "causal",
                attn_mask=_cast(mask, query.dtype),
                scale=ctx.scale,
            )
            for total, part, where in zip(grads, parts, (rows, seen, seen), strict=True):
                # Pieces are ordered: a row is first query and key of its own segment.
                target = total[:, :, where]
                target.add_(part) if piece.kind == "full" else target.copy_(part)
        return (*(total.to(query.dtype) for total in grads), None, None)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, pieces: tuple[tuple[Piece, Tensor | None], ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Output [1, H, P, D] and log-sum-exp [1, H, P]; both in the memory layout of the kernel."""
    _, num_heads, num_rows, size = query.shape
    output = query.new_empty(1, num_rows, num_heads, size, dtype=torch.float32).transpose(1, 2)
    normalizer = query.new_empty(1, num_rows, num_heads, dtype=torch.float32).transpose(1, 2)
    for piece, mask in pieces:
        rows, seen = slice(piece.query_start, piece.query_stop), slice(piece.key_start, piece.key_stop)
        part, part_normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, rows],
            key[:, :, seen],
            value[:, :, seen],
            0.0,
            piece.kind == "causal",
            attn_mask=_cast(mask, query.dtype),
            scale=scale,
        )
        total, total_normalizer = output[:, :, rows], normalizer[:, :, rows]
        if piece.kind == "full":
            share = torch.sigmoid(part_normalizer - total_normalizer)[..., None]
            total.lerp_(part.float(), share)
            torch.logaddexp(total_normalizer, part_normalizer, out=total_normalizer)
        else:
            total.copy_(part)
            total_normalizer.copy_(part_normalizer)
    return output.to(query.dtype), normalizer


def _cast(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else mask.to(dtype)

"""The vocabulary projection of many rows, in chunks whose weight gradients go into one buffer.

Owns a plain projection's forward and backward pass. Invariant: at no time do the logits of more than one chunk exist,
and in the products' own type no gradient of the weight besides the buffer that becomes it; logits are computed again
backward. Autograd would hold the weight's gradients of two chunks, which is more than the logits. Pure. Called by
model.py.

Shapes: R rows, D hidden size, V vocabulary, U wanted (row, token) pairs, C rows of one chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from penstock_trainer.projection import evaluate, turn_into_gradient


@dataclass(frozen=True)
class Projection:
    """How: rows of a chunk, the type of the products, and whether the entropy has a gradient."""

    chunk_rows: int
    dtype: torch.dtype
    temperature: float
    entropy_gradient: bool


def is_plain(head: nn.Module) -> bool:
    """Whether the head is its weight and bias and nothing else: no adapter in it, nobody's hook on it."""
    return type(head) is nn.Linear and not (
        head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    )


def projected_logprobs(
    hidden_RD: Tensor, head: nn.Linear, row_U: Tensor, token_U: Tensor, projection: Projection
) -> tuple[Tensor, Tensor]:
    """log softmax(head(hidden) / temperature) at the U pairs, and the entropy of every row, float32."""
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _ProjectedLogprobs.apply)
    return apply(hidden_RD, head.weight, head.bias, row_U, token_U, projection)


class _ProjectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        row_U: Tensor,
        token_U: Tensor,
        projection: Projection,
    ) -> tuple[Tensor, Tensor]:
        logprobs_U = hidden_RD.new_empty(row_U.shape, dtype=torch.float32)
        entropy_R = hidden_RD.new_empty(hidden_RD.shape[0], dtype=torch.float32)
        normalizer_R = torch.empty_like(entropy_R)
        with torch.autocast(hidden_RD.device.type, enabled=False):
            weight, bias = weight_VD.to(projection.dtype), _typed(bias_V, projection.dtype)
            for rows, wanted_U in _chunks(hidden_RD, row_U, projection.chunk_rows):
                logits_CV = linear(hidden_RD[rows].to(projection.dtype), weight, bias).float()
                logprobs_U[wanted_U], entropy_R[rows], normalizer_R[rows] = evaluate(
                    logits_CV, row_U[wanted_U] - rows.start, token_U[wanted_U], projection.temperature
                )
                del logits_CV  # before the next chunk's
        ctx.save_for_backward(hidden_RD, weight_VD, bias_V, row_U, token_U, normalizer_R, entropy_R)
        ctx.projection = projection
        if not projection.entropy_gradient:
            ctx.mark_non_differentiable(entropy_R)
        return logprobs_U, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_U: Tensor, grad_entropy_R: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, weight_VD, bias_V, row_U, token_U, normalizer_R, entropy_R = ctx.saved_tensors
        projection: Projection = ctx.projection
        grad_hidden_RD = torch.empty_like(hidden_RD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        weight, bias = weight_VD.to(projection.dtype), _typed(bias_V, projection.dtype)
        for rows, wanted_U in _chunks(hidden_RD, row_U, projection.chunk_rows):
            hidden_CD = hidden_RD[rows].to(projection.dtype)
            gradient_CV = turn_into_gradient(
                linear(hidden_CD, weight, bias).float(),
                row_U[wanted_U] - rows.start,
                token_U[wanted_U],
                normalizer_R[rows],
                entropy_R[rows],
                grad_U[wanted_U],
                grad_entropy_R[rows] if projection.entropy_gradient else None,
                projection.temperature,
            )
            if grad_bias_V is not None:
                grad_bias_V += gradient_CV.sum(0)
            gradient_CV = gradient_CV.to(projection.dtype)
            grad_hidden_RD[rows] = gradient_CV @ weight
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, gradient_CV.t(), hidden_CD)
            del gradient_CV  # before the next chunk's logits
        return (
            grad_hidden_RD,
            _typed(grad_weight_VD, weight_VD.dtype),
            _typed(grad_bias_V, weight_VD.dtype),
            *[None] * 3,
        )


def _chunks(hidden_RD: Tensor, row_U: Tensor, chunk_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of each chunk, and which of the U pairs are of them."""
    for start in range(0, hidden_RD.shape[0], chunk_rows):
        stop = min(start + chunk_rows, hidden_RD.shape[0])
        yield slice(start, stop), (row_U >= start) & (row_U < stop)


def _add_product(sum_VD: Tensor, left_VC: Tensor, right_CD: Tensor) -> None:
    if left_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(left_VC, right_CD)
    else:
        sum_VD += left_VC @ right_CD


def _typed(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)

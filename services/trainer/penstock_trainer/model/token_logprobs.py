"""Token log-probabilities and entropy, and their gradient, in little more memory than one chunk of logits needs.

Owns the softmax over the vocabulary and the projection before it. Invariants: besides the logits of one chunk only a
few of their rows exist at once, forward and backward; the gradient of a chunk takes the memory of its logits, so a
chunk goes backward once. A plain projection is computed in chunks whose weight gradients go into one buffer, and its
logits are computed again in the backward pass: autograd would hold the weight's gradients of two chunks, which is more
than the logits. Pure.

With x = logits / T, Z = logsumexp(x), p = exp(x - Z), H = -sum p log p:

    d logprob(j) / dx = onehot(j) - p        dH / dx = -p (log p + H)

Shapes: R rows, D hidden size, V vocabulary, U wanted (row, token) pairs, B rows of one block, C rows of one chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

CPU_BLOCK_BYTES = 4 * 2**20  # stays in the cache between the passes over it
GPU_BLOCK_BYTES = 32 * 2**20  # enough work for a launch


def logprobs_of_logits(
    logits_RV: Tensor, row_U: Tensor, token_U: Tensor, temperature: float, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the U pairs, and the entropy of every row.

    The backward pass overwrites `logits`. The entropy has a gradient only with `entropy_gradient`.
    """
    apply = cast(Callable[..., tuple[Tensor, Tensor]], _TokenLogprobs.apply)
    return apply(logits_RV, row_U, token_U, temperature, entropy_gradient)


def _blocks(logits_RV: Tensor) -> Iterator[slice]:
    block_bytes = CPU_BLOCK_BYTES if logits_RV.device.type == "cpu" else GPU_BLOCK_BYTES
    num_rows = max(1, block_bytes // (4 * logits_RV.shape[1]))
    for start in range(0, logits_RV.shape[0], num_rows):
        yield slice(start, min(start + num_rows, logits_RV.shape[0]))


def evaluate(logits_RV: Tensor, row_U: Tensor, token_U: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities of the U pairs; entropy and Z of every row."""
    normalizer_R = logits_RV.new_empty(logits_RV.shape[0])
    entropy_R = torch.empty_like(normalizer_R)
    for rows in _blocks(logits_RV):
        scaled_BV = logits_RV[rows] / temperature
        normalizer_R[rows] = torch.logsumexp(scaled_BV, dim=-1)
        logprobs_BV = scaled_BV.sub_(normalizer_R[rows, None])
        entropy_R[rows] = -(logprobs_BV.exp() * logprobs_BV).sum(-1)
    return logits_RV[row_U, token_U] / temperature - normalizer_R[row_U], entropy_R, normalizer_R


def turn_into_gradient(
    logits_RV: Tensor,
    row_U: Tensor,
    token_U: Tensor,
    normalizer_R: Tensor,
    entropy_R: Tensor,
    grad_U: Tensor,
    grad_entropy_R: Tensor | None,
    temperature: float,
) -> Tensor:
    """The gradient of the logits, in their memory, from those of the log-probabilities and, if any, the entropies."""
    total_R = torch.zeros_like(normalizer_R).index_add_(0, row_U, grad_U)
    for rows in _blocks(logits_RV):
        logprobs_BV = logits_RV[rows].div_(temperature).sub_(normalizer_R[rows, None])
        if grad_entropy_R is None:
            logprobs_BV.exp_().mul_(total_R[rows, None] / -temperature)
        else:
            factor_BV = (logprobs_BV + entropy_R[rows, None]).mul_(grad_entropy_R[rows, None]).add_(total_R[rows, None])
            logprobs_BV.exp_().mul_(factor_BV).mul_(-1 / temperature)
    return logits_RV.index_put_((row_U, token_U), grad_U / temperature, accumulate=True)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, row_U: Tensor, token_U: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs_U, entropy_R, normalizer_R = evaluate(logits_RV, row_U, token_U, temperature)
        ctx.save_for_backward(logits_RV, row_U, token_U, normalizer_R, entropy_R)
        ctx.temperature = temperature
        ctx.entropy_gradient = entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_R)
        return logprobs_U, entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_U: Tensor, grad_entropy_R: Tensor) -> tuple[Tensor | None, ...]:
        grad_of_entropy = grad_entropy_R if ctx.entropy_gradient else None
        logits_RV, row_U, token_U, normalizer_R, entropy_R = ctx.saved_tensors
        gradient_RV = turn_into_gradient(
            logits_RV, row_U, token_U, normalizer_R, entropy_R, grad_U, grad_of_entropy, ctx.temperature
        )
        return gradient_RV, None, None, None, None


@dataclass(frozen=True)
class Projection:
    """Parameters: rows of a chunk, the type of the products, and whether the entropy has a gradient."""

    chunk_rows: int
    dtype: torch.dtype
    temperature: float
    entropy_gradient: bool


def is_plain(head: nn.Module) -> bool:
    """Whether the head is its weight and bias alone, without an adapter or a hook."""
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
    """Rows of each chunk, and which of the U pairs they hold."""
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

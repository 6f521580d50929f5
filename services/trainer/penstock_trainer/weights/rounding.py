"""From float32 master weights to the type that is published.

Rounding to nearest hides updates smaller than half a bfloat16 step: the masters change, and the published weights do
not. Dithered rounding adds a fixed pseudo-random offset in [0, 1) steps to each weight before truncation, so that over
many weights the published values follow the masters without bias, and equal masters give equal bytes on every call.
Values on the bfloat16 grid do not change. Pure.

Shapes: N elements, L length of the offset pattern, C of a chunk.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PATTERN_LENGTH = 1 << 16  # every 16-bit offset once
CHUNK_LENGTH = 4 * PATTERN_LENGTH  # 1 MiB of float32: fits a core's cache, and threads seldom need the interpreter
MAX_BFLOAT16 = torch.finfo(torch.bfloat16).max


def dither_offsets(device: torch.device) -> Tensor:
    """int32[L]: a fixed pseudo-random permutation of 0..65535, made of steps that each permute 16-bit numbers."""
    offset_L = torch.arange(PATTERN_LENGTH, dtype=torch.int64)
    for multiplier, shift in ((0x88B5, 7), (0xDB2D, 9), (0x6F4B, 8)):  # odd, so that multiplying permutes
        offset_L = (offset_L * multiplier) & 0xFFFF
        offset_L = offset_L ^ (offset_L >> shift)
    return offset_L.to(torch.int32).to(device)


class Dither:
    """Rounds chunks of weights on one device; it reuses buffers, as the cost of rounding is memory traffic."""

    def __init__(self, device: torch.device) -> None:
        self._offsets_C = dither_offsets(device).repeat(CHUNK_LENGTH // PATTERN_LENGTH)
        self._bits_C = torch.empty_like(self._offsets_C)
        self._rounded_C = torch.empty(CHUNK_LENGTH, dtype=torch.int16, device=device)

    def round(self, values_N: Tensor) -> Tensor:
        """bfloat16[N] of float32[N], N <= C: (bits + offset) with the lower 16 bits cut off. Valid until the next call.

        Each value becomes one of its two neighbours; the nearer one is more likely. Finite values stay finite: a value
        that would round beyond the largest bfloat16 becomes the largest. inf and nan stay.
        """
        num = values_N.numel()
        bits_N, rounded_N = self._bits_C[:num], self._rounded_C[:num]
        torch.add(values_N.view(torch.int32), self._offsets_C[:num], out=bits_N)
        sum_of_rounded = bits_N.view(torch.float32).sum().item()  # cheap while the bits are in the cache
        rounded_N.copy_(bits_N.bitwise_right_shift_(16))
        if not math.isfinite(sum_of_rounded):
            return _repair_extremes(values_N, rounded_N.view(torch.bfloat16))
        return rounded_N.view(torch.bfloat16)


def _repair_extremes(values_N: Tensor, rounded_N: Tensor) -> Tensor:
    largest_N = torch.full_like(values_N, MAX_BFLOAT16).copysign(values_N).bfloat16()
    finite_N = torch.where(torch.isfinite(rounded_N), rounded_N, largest_N)
    return torch.where(torch.isfinite(values_N), finite_N, values_N.bfloat16())


def is_finite(values_N: Tensor) -> bool:
    """Whether no value is inf or nan. The sum is cheap while the values are in the cache."""
    return math.isfinite(values_N.sum().item()) or bool(torch.isfinite(values_N).all())


def published_chunks(
    weight: Tensor, dtype: torch.dtype, dither: Dither | None, length: int = CHUNK_LENGTH
) -> Iterator[Tensor]:
    """The weight's elements in order, in `dtype`, on the CPU, in chunks, each valid until the next.

    Without `dither` they are rounded to nearest. The offsets repeat every L elements, from a weight's first one.
    `length`: elements of a chunk, a multiple of L up to C.
    """
    use_dither = dtype == torch.bfloat16 and weight.dtype == torch.float32
    for values_N in torch.split(weight.detach().reshape(-1), length):
        rounded_N = dither.round(values_N) if dither is not None and use_dither else values_N.to(dtype)
        yield rounded_N.cpu()

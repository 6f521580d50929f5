"""Receiving broadcast weights on a CPU without a second copy of them.

SGLang makes a tensor for each weight of a bucket, then concatenates them into the buffer that it receives into: it
writes a bucket's worth of memory that nobody has filled yet. Here the buffer is made at once, and kept for the next
bucket, so that its pages are there. The weights are views of it, copied into the model before the next bucket comes.

Runs inside SGLang's scheduler; registered by `engine.launcher` through SGLang's hook registry.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

Hook = Callable[..., Any]
METHOD = (
    "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater."
    "_receive_bucketed_weights_from_distributed"
)


def hooks() -> dict[str, Hook]:
    """What to put around SGLang's methods, by their full names."""
    return {METHOD: Receiver()}


class Receiver:
    """Its buffer grows to the largest bucket."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __call__(
        self,
        _: Hook,
        updater: Any,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
    ) -> list[tuple[str, torch.Tensor]]:
        """The next broadcast in the group, as named tensors."""
        types = [getattr(torch, dtype) for dtype in dtypes]
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, types, strict=True)]
        if self._buffer.numel() < sum(sizes):
            self._buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        flat = self._buffer[: sum(sizes)]
        torch.distributed.broadcast(flat, src=0, group=updater._model_update_group[group_name])
        pieces = zip(names, types, shapes, flat.split(sizes), strict=True)
        return [(name, piece.view(dtype).view(tuple(shape))) for name, dtype, shape, piece in pieces]

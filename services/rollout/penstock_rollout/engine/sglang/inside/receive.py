"""Receives broadcast weights on a CPU into two lasting buffers, and receives a bucket while the last one is copied.

For each bucket SGLang makes an empty tensor per weight and concatenates them into the buffer that it receives into: it
copies a full bucket of memory that has no content yet. Here the weights are views of one of two buffers, whose pages
stay mapped. A trainer sends the buckets of a group in the same order at each push. So from the second push on, the size
of the next bucket is known, and a thread receives it early. If that fails, the request for that bucket fails. The
service ends an engine whose update has failed, so no receive outlives its update.

Runs inside SGLang's scheduler; `launcher` registers it in SGLang's hook registry.
"""

import threading
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
    """The hooks around SGLang's methods, by their full names."""
    return {METHOD: Receiver()}


class Receiver:
    """Receives the buckets of one group at a time; the name of its first weight identifies a bucket."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(2)]
        self._group_name = ""
        self._first = self._previous = ""
        self._sizes_after: dict[str, int] = {}
        self._ahead: _Ahead | None = None

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
        """The next broadcast in the group, as named tensors. They are valid until the call after the next."""
        types = [getattr(torch, dtype) for dtype in dtypes]
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, types, strict=True)]
        group = updater._model_update_group[group_name]
        self._learn(group_name, names[0], sum(sizes))
        flat = self._receive(group, sum(sizes))
        if (size_after := self._sizes_after.get(names[0])) is not None:
            self._ahead = _Ahead(group, self._buffer(size_after))
        pieces = zip(names, types, shapes, flat.split(sizes), strict=True)
        return [(name, piece.view(dtype).view(tuple(shape))) for name, dtype, shape, piece in pieces]

    def _learn(self, group_name: str, name: str, size: int) -> None:
        """Note the size of the bucket that follows the previous one; the first bucket follows none."""
        if group_name != self._group_name:
            self._group_name, self._first, self._sizes_after, self._ahead = group_name, name, {}, None
        elif name != self._first:
            self._sizes_after[self._previous] = size
        self._previous = name

    def _receive(self, group: Any, size: int) -> torch.Tensor:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            ahead = _Ahead(group, self._buffer(size))
        flat = ahead.result()
        if flat.numel() != size:
            raise RuntimeError(f"expected a bucket of {flat.numel()} bytes, as in the push before; asked for {size}")
        return flat

    def _buffer(self, size: int) -> torch.Tensor:
        """The buffer that was not returned last."""
        self._buffers.reverse()
        if self._buffers[0].numel() < size:
            self._buffers[0] = torch.empty(size, dtype=torch.uint8)
        return self._buffers[0][:size]


class _Ahead:
    """One broadcast, received in a thread."""

    def __init__(self, group: Any, flat: torch.Tensor) -> None:
        self._flat = flat
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(group,), daemon=True, name="receive")
        self._thread.start()

    def _run(self, group: Any) -> None:
        try:
            torch.distributed.broadcast(self._flat, src=0, group=group)
        except Exception as error:
            self._error = error

    def result(self) -> torch.Tensor:
        """The received bytes; raises the error if there are none."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._flat

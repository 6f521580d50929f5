"""Where the tensors of training are: on the device that computes, or in host memory while others need that device.

Owns the moves. Invariant: a move changes no bit and no object: a parameter, its moments and a model's buffers stay the
same tensors with other memory, so that all who hold them see the move. On the way to the host memory is pinned if the
device is a GPU, and kept for the next move: pinning takes longer than copying.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

Allocate = Callable[[Tensor], Tensor]
"""An empty tensor like the given one, in the memory of one side."""


class Residence:
    """Moves a set of tensors between host memory and a device."""

    def __init__(
        self,
        to_device: Allocate,
        to_host: Allocate,
        wait: Callable[[], None],
        free: Callable[[], None],
        is_home: Callable[[Tensor], bool],
    ) -> None:
        """`wait`: return when all copies are made. `free`: give unused memory of the device back.

        `is_home`: whether memory of the host is for the way back.
        """
        self._allocate_on_device = to_device
        self._allocate_on_host = to_host
        self._wait = wait
        self._free = free
        self._is_home = is_home
        self._on_host: dict[int, Tensor] = {}  # by the identity of the tensor

    @classmethod
    def of(cls, device: torch.device) -> "Residence":
        """Between the host and `device`; if that is the CPU, each move copies within host memory."""
        is_gpu = device.type == "cuda"
        return cls(
            lambda tensor: torch.empty_like(tensor, device=device),
            lambda tensor: torch.empty_like(tensor, device="cpu", pin_memory=is_gpu),
            torch.cuda.synchronize if is_gpu else lambda: None,
            torch.cuda.empty_cache if is_gpu else lambda: None,
            lambda tensor: tensor.is_pinned() if is_gpu else True,
        )

    def to_device(self, tensors: Iterable[Tensor]) -> None:
        """Move to the device."""
        for tensor in tensors:
            if self._is_home(tensor.data):
                self._on_host[id(tensor)] = tensor.data
            _move(tensor, self._allocate_on_device(tensor))
        self._wait()

    def to_host(self, tensors: Iterable[Tensor]) -> None:
        """Move to host memory, and give the device's memory back."""
        for tensor in tensors:
            own = self._on_host.pop(id(tensor), None)
            _move(tensor, self._allocate_on_host(tensor) if own is None else own)
        self._wait()
        self._free()

    def forget(self) -> None:
        """The tensors that are on the device are no more."""
        self._on_host.clear()


def _move(tensor: Tensor, memory: Tensor) -> None:
    tensor.data = memory.copy_(tensor.data, non_blocking=True)


def tensors_of(models: Iterable[nn.Module], state: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each parameter and buffer of the models and each tensor of the state, once."""
    seen: set[int] = set()
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor
    for tensor in state:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor

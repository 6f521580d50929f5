"""A GPU that is not there: tensors that say they are on `cuda:0`, and compute on the CPU.

Owns what a GPU would refuse and a CPU does not: an operation on tensors of both (except copies, indices and tensors of
one number), and numpy's view of a tensor of the GPU. Invariant: the values are those of the CPU. What is compiled for a
GPU is computed from its definition, since there is nothing to compile for.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from penstock_trainer.model import attention
from penstock_trainer.weights import files

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten: Any = torch.ops.aten
# These take tensors of both devices, on a real GPU too.
MIXED = {
    *(aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default),
    aten._index_put_impl_.default,
}


class PretendedTensor(Tensor):
    """A tensor on the pretended GPU; `held`: its values. To torch's C++ it is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "PretendedTensor":
        made: PretendedTensor = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CPU
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def data_ptr(self) -> int:
        return self.held.data_ptr()


class _Checked(TorchDispatchMode):
    """Checks the devices of each operation, and keeps its results where its inputs are."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    on_gpu = [each for each in tensors if isinstance(each, PretendedTensor)]
    elsewhere = [each for each in tensors if not isinstance(each, PretendedTensor) and each.dim()]
    if on_gpu and elsewhere and func not in MIXED:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu"
        )
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not (isinstance(args[0], PretendedTensor) if func is aten.copy_.default else on_gpu):
        return result
    made = tree_map(lambda each: PretendedTensor(each) if isinstance(each, Tensor) else each, result)
    return return_and_correct_aliasing(func, args, kwargs, made)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendedTensor) else value


class _Placed(TorchFunctionMode):
    """Moves a tensor to the device that is asked for, and makes new ones there. A move has no gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, args, kwargs)
        if func is Tensor.tolist:
            return _held(args[0]).tolist()
        device = kwargs.get("device")
        kwargs.pop("pin_memory", None)
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        return PretendedTensor(func(*args, **{**kwargs, "device": CPU}))


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    tensor: Tensor = args[0]
    wanted = [each for each in (*args[1:], kwargs.get("device")) if isinstance(each, str | torch.device)]
    if func is not Tensor.to:
        wanted = [GPU if func is Tensor.cuda else CPU]
    rest: list[Any] = [CPU if isinstance(each, str | torch.device) else each for each in args[1:]]
    kwargs = {**kwargs, **({"device": CPU} if kwargs.get("device") is not None else {})}
    if not wanted or torch.device(wanted[0]).type == tensor.device.type:
        return tensor.to(*rest, **kwargs) if func is Tensor.to else tensor
    with torch.no_grad():
        held = tensor.held if isinstance(tensor, PretendedTensor) else tensor.detach()
        copy = held.to(*rest, **{**kwargs, "copy": True}) if func is Tensor.to else held.clone()
    return PretendedTensor(copy) if torch.device(wanted[0]).type == "cuda" else copy


@dataclass(frozen=True)
class _Blocks:
    """The mask that a compiled `create_block_mask` would describe, in full."""

    mask_PP: Tensor


def _blocks(sees: Any, batch: None, head: None, num_rows: int, num_keys: int, *, device: torch.device) -> _Blocks:
    row_P, key_P = torch.arange(num_rows, device=device), torch.arange(num_keys, device=device)
    return _Blocks(sees(batch, head, row_P[:, None], key_P[None, :]))


def _attend(query: Tensor, key: Tensor, value: Tensor, *, block_mask: _Blocks, scale: float) -> Tensor:
    scores = (query @ key.transpose(-1, -2)) * scale
    return scores.masked_fill(~block_mask.mask_PP, float("-inf")).softmax(-1) @ value


class _Threads(ThreadPoolExecutor):
    """Threads that see the GPU too: torch's modes are of one thread."""

    def __init__(self, num_threads: int, name: str) -> None:
        super().__init__(num_threads, name, initializer=_see_it)


def _see_it() -> None:
    for mode in (_Checked(), _Placed()):
        mode.__enter__()  # type: ignore[no-untyped-call]


class _Autocast(torch.autocast):
    """That of the CPU, which computes in bfloat16 too, for the pretended GPU."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        assert device_type == "cuda", f"autocast for {device_type}, and the model is on a GPU"
        super().__init__("cpu", *args, **kwargs)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within it there is a GPU, as far as the trainer can tell."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    is_enabled = torch.is_autocast_enabled
    with pytest.MonkeyPatch.context() as patch, _Checked(), _Placed():
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "current_stream", lambda *_: SimpleNamespace(synchronize=lambda: None))
        patch.setattr(torch, "autocast", _Autocast)
        patch.setattr(torch, "is_autocast_enabled", lambda *_: is_enabled("cpu"))
        patch.setattr(attention, "_compiled_mask", lambda: _blocks)
        patch.setattr(attention, "_compiled_attention", lambda: _attend)
        patch.setattr(files, "ThreadPoolExecutor", _Threads)
        torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied, as on a GPU
        try:
            yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)

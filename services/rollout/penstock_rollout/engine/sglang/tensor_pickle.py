"""Writes SGLang's format for tensors in shared memory: a pickle that names them.

SGLang unpickles the body of `/update_weights_from_tensor`, and accepts only names on its list. Tensors in one piece of
shared memory are, in torch's terms,

    [(name, _rebuild_tensor_v2(rebuild_typed_storage(rebuild_storage_filename(...), dtype), offset, shape, strides,
                               False, OrderedDict())), ...]

Owns this format. The module needs neither torch nor pickle, because it only writes their names. Pure.
"""

import struct
from itertools import accumulate
from math import prod

from penstock.contracts.weight_sources import SharedBucket, TensorSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
PROTOCOL, STOP = b"\x80\x03", b"."
STORAGE = 0  # index in the unpickler's memo


def pickled_tensors(manager: str, bucket: SharedBucket) -> bytes:
    """The list of (name, tensor) of a bucket; its memory is mapped once."""
    storage = _call(
        "torch.multiprocessing.reductions",
        "rebuild_storage_filename",
        _global("torch.storage", "UntypedStorage"),
        _bytes(manager.encode()),
        _bytes(bucket.handle.encode()),
        _integer(bucket.num_bytes),
    )
    sizes = [prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in bucket.tensors]
    starts = accumulate(sizes, initial=0)
    pairs = b"".join(_pair(tensor, start) for tensor, start in zip(bucket.tensors, starts, strict=False))
    remembered = storage + b"q" + bytes([STORAGE]) + b"0"  # store it in the memo, then pop it from the stack
    return PROTOCOL + remembered + b"](" + pairs + b"e" + STOP


def _pair(tensor: TensorSpec, start: int) -> bytes:
    """(name, tensor), for a tensor that begins at byte `start` of the storage."""
    typed = _call(
        "torch.multiprocessing.reductions",
        "rebuild_typed_storage",
        b"h" + bytes([STORAGE]),
        _global("torch", tensor.dtype),
    )
    rebuilt = _call(
        "torch._utils",
        "_rebuild_tensor_v2",
        typed,
        _integer(start // ITEM_BYTES[tensor.dtype]),
        _tuple(*map(_integer, tensor.shape)),
        _tuple(*map(_integer, _strides(tensor.shape))),
        b"\x89",  # requires_grad is False
        _call("collections", "OrderedDict"),
    )
    return _tuple(_text(tensor.name), rebuilt)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, in elements."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _call(module: str, name: str, *arguments: bytes) -> bytes:
    return _global(module, name) + _tuple(*arguments) + b"R"


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _integer(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _bytes(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value

"""SGLang's format of tensors in shared memory: a pickle that names them, written without running any pickle code.

SGLang unpickles what `/update_weights_from_tensor` brings, with a list of what it may name. Tensors on one piece of
shared memory are, in torch's words,

    [(name, _rebuild_tensor_v2(rebuild_typed_storage(rebuild_storage_filename(...), dtype), offset, shape, strides,
                               False, OrderedDict())), ...]

Owns this format. It needs neither torch nor pickle: only their names are written. Pure.
"""

import struct
from itertools import accumulate
from math import prod

from penstock.contracts.weight_sources import ITEM_BYTES, SharedBucket, TensorSpec

PROTOCOL, STOP = b"\x80\x03", b"."
STORAGE = 0  # place in the unpickler's memory


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
    starts = accumulate((tensor.num_bytes for tensor in bucket.tensors), initial=0)
    pairs = b"".join(_pair(tensor, start) for tensor, start in zip(bucket.tensors, starts, strict=False))
    remembered = storage + b"q" + bytes([STORAGE]) + b"0"  # stored, and taken from the stack again
    return PROTOCOL + remembered + b"](" + pairs + b"e" + STOP


def _pair(tensor: TensorSpec, start: int) -> bytes:
    """(name, tensor), the tensor `start` bytes into the storage."""
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
        b"\x89",  # requires no gradient
        _call("collections", "OrderedDict"),
    )
    return _tuple(_text(tensor.name), rebuilt)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
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

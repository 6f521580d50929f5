"""Reads a GGUF file: metadata and tensors as float32 arrays.

Owns the file format (version 3, little-endian) as far as the demo's model needs it: tensors of type
F32, F16, Q8_0 and Q4_1. The `gguf` package reads every type, but takes 8 s over
the 98,000 strings of this vocabulary; this takes 0.2 s.

Layout: magic, version, counts; key-value pairs; tensor descriptions; padding; tensor data.
A quantised tensor is rows of blocks of 32 values: Q8_0 is (float16 scale, 32 int8), Q4_1 is
(float16 scale, float16 minimum, 16 bytes with value i in the low and i + 16 in the high half).
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

BLOCK = 32
STRING, ARRAY = 8, 9
# GGUF's number for a type of metadata -> struct's letter for it.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GgufError(ValueError):
    """The file is not a GGUF file of the supported kind."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies and how it is stored; `shape` is in NumPy's order (rows first)."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key and tensors by name."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    data: bytes

    def array(self, name: str) -> Array:
        """The tensor `name`, dequantised."""
        tensor = self.tensors[name]
        if tensor.kind not in KINDS:
            raise GgufError(f"tensor {name} has type {tensor.kind}: expected one of {sorted(KINDS)}")
        block_values, block_bytes, decode = KINDS[tensor.kind]
        num_bytes = math.prod(tensor.shape) // block_values * block_bytes
        raw = self.data[tensor.start : tensor.start + num_bytes]
        if len(raw) != num_bytes:
            raise GgufError(f"tensor {name} has {len(raw)} bytes: expected {num_bytes}; the file is truncated")
        return decode(raw).reshape(tensor.shape)


class _Cursor:
    """A position in the file that moves on with every value read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def scalar(self, letter: str) -> Any:
        (value,) = struct.unpack_from("<" + letter, self.data, self.position)
        self.position += struct.calcsize("<" + letter)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.position
        self.position += length
        return self.data[start : self.position].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item_kind, length = self.scalar("I"), self.scalar("Q")
            return [self.value(item_kind) for _ in range(length)]
        if kind not in SCALARS:
            raise GgufError(f"metadata of type {kind} at byte {self.position}: expected 0 to 12")
        return self.scalar(SCALARS[kind])


def _float32(raw: bytes) -> Array:
    return np.frombuffer(raw, "<f4").astype(np.float32)


def _float16(raw: bytes) -> Array:
    return np.frombuffer(raw, "<f2").astype(np.float32)


def _q8_0(raw: bytes) -> Array:
    blocks = np.frombuffer(raw, np.dtype([("scale", "<f2"), ("values", "i1", BLOCK)]))
    return blocks["values"].astype(np.float32) * blocks["scale"].astype(np.float32)[:, None]


def _q4_1(raw: bytes) -> Array:
    blocks = np.frombuffer(raw, np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("values", "u1", BLOCK // 2)]))
    values = np.concatenate([blocks["values"] & 15, blocks["values"] >> 4], axis=1).astype(np.float32)
    return values * blocks["scale"].astype(np.float32)[:, None] + blocks["minimum"].astype(np.float32)[:, None]


# GGUF's number for a type of tensor -> (values per block, bytes per block, decoder).
KINDS: dict[int, tuple[int, int, Callable[[bytes], Array]]] = {
    0: (1, 4, _float32),
    1: (1, 2, _float16),
    3: (BLOCK, 20, _q4_1),
    8: (BLOCK, 34, _q8_0),
}


def read_gguf(path: Path) -> GgufFile:
    """The file's metadata and tensors; GgufError where it is none."""
    data = path.read_bytes()
    if data[:4] != b"GGUF":
        raise GgufError(f"{path} starts with {data[:4]!r}: expected b'GGUF'")
    cursor = _Cursor(data)
    cursor.position = 4
    try:
        version, num_tensors, num_pairs = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
        if version != 3:
            raise GgufError(f"{path} has version {version}: expected 3")
        metadata = {}
        for _ in range(num_pairs):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.scalar("I"))
        described = []
        for _ in range(num_tensors):
            name = cursor.string()
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(cursor.scalar("I"))]))
            described.append(Tensor(name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    except struct.error as error:
        raise GgufError(f"{path} ends within its header: {error}") from error
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.position // alignment) * alignment
    tensors = {item.name: Tensor(item.name, item.shape, item.kind, base + item.start) for item in described}
    return GgufFile(metadata, tensors, data)

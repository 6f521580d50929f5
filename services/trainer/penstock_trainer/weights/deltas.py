"""Writes each version as the changes since the previous one, and keeps a full copy of the last one to compare with.

Owns that copy, in a folder of this process on its own host. Invariant: the copy holds the bits of the version that was
written last, or counts as empty. Each piece of a tensor is compared while it is in the processor's cache, and only the
changes of the few tensors in progress are in memory.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from penstock.contracts import Dtype
from penstock.weights.delta_codec import Numbers, encode, unchanged
from penstock.weights.local_folder import LocalFolder
from penstock.weights.manifest import Delta, TensorDelta, TensorEntry, identity_digest, tensor_bytes
from penstock_trainer.weights.files import WEIGHTS_NAME, Format, Weights, digest_of, write_at, write_weights

DELTA_NAME = "delta.bin"
COPY_BYTES = 1 << 24
BLOCK_LENGTH = 1 << 16  # elements of a block
BITS: dict[Dtype, type[np.unsignedinteger]] = {"float32": np.uint32, "bfloat16": np.uint16}


@dataclass(frozen=True)
class Base:
    """The version that the copy holds: the name of its folder, and its tensors."""

    name: str
    tensors: dict[str, TensorEntry]


class DeltaWriter:
    """Deltas of one trainer's versions: the first is full, and then every `full_every`th is both full and a delta."""

    def __init__(self, claim: Callable[[int], LocalFolder], form: Format, full_every: int) -> None:
        """`claim`: bytes needed -> the folder of the copy."""
        self._claim = claim
        self._form = form
        self._full_every = full_every
        self._folder: LocalFolder | None = None
        self._base: Base | None = None
        self._num_since_full = 0

    @property
    def copy_bytes(self) -> int:
        """Size of the full copy."""
        return self._copy.stat().st_size

    @property
    def full_is_due(self) -> bool:
        """Whether the last written version must also exist in full."""
        return self._num_since_full >= self._full_every

    def write(
        self, folder: Path, name: str, weights: Weights, *, durable: bool
    ) -> tuple[dict[str, TensorEntry], Delta | None]:
        """Write the delta of `weights` into `folder`, whose final name is `name`; entries of all tensors.

        No delta if there is no base.
        """
        base, self._base = self._base, None
        if base is None:
            needed_bytes = sum(map(self._form.num_bytes, weights.shapes.values()))
            self._folder = self._folder or self._claim(needed_bytes)
            tensors, delta = write_weights(self._copy, weights, self._form, durable=False), None
            self._num_since_full = self._full_every
        else:
            tensors, delta = self._write_delta(folder / DELTA_NAME, base, weights, durable)
            self._num_since_full += 1
        self._base = Base(name, tensors)
        return tensors, delta

    def copy_full(self, target: Path, *, durable: bool) -> None:
        """Write the last written version in full, over the old content of `target`."""
        target.touch()
        with self._copy.open("rb", buffering=0) as source, target.open("r+b", buffering=0) as file:
            buffer = memoryview(bytearray(COPY_BYTES))
            start = 0
            while num_bytes := source.readinto(buffer):
                write_at(file.fileno(), buffer[:num_bytes], start)
                start += num_bytes
            file.truncate(start)
            if durable:
                os.fsync(file.fileno())
        self._num_since_full = 0

    def close(self) -> None:
        """Remove the copy."""
        self._base = None
        if self._folder is not None:
            self._folder.release()
            self._folder = None

    @property
    def _copy(self) -> Path:
        assert self._folder is not None
        return self._folder.path / WEIGHTS_NAME

    def _write_delta(
        self, path: Path, base: Base, weights: Weights, durable: bool
    ) -> tuple[dict[str, TensorEntry], Delta]:
        copy = tensor_bytes(self._copy, base.tensors, writable=True)

        def change(name: str, pieces: Iterator[memoryview]) -> tuple[str, bytes]:
            return _change_tensor(np.frombuffer(copy[name], BITS[self._form.dtype]), pieces)

        tensors: dict[str, TensorEntry] = {}
        deltas: dict[str, TensorDelta] = {}
        with path.open("wb") as file:
            for name, (digest, data) in self._form.each(weights, change, BLOCK_LENGTH):
                old = base.tensors[name]
                tensors[name] = TensorEntry(old.file, old.dtype, old.shape, digest)
                if data:
                    deltas[name] = TensorDelta(file.tell(), len(data), xxhash.xxh3_64_hexdigest(data))
                    file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        base_digest = identity_digest({name: entry.digest for name, entry in base.tensors.items()})
        return tensors, Delta(base.name, base_digest, path.name, deltas)


def _change_tensor(bits_N: Numbers, pieces: Iterator[memoryview]) -> tuple[str, bytes]:
    """Bring a tensor's bits up to date; return their digest, and their delta, which is empty if nothing changed."""
    blocks: list[bytes] = []
    changed = False

    def change(piece: memoryview, start: int) -> None:
        nonlocal changed
        new = np.frombuffer(piece, bits_N.dtype)
        old = bits_N[start // bits_N.itemsize :][: len(new)]
        block = encode(old, new)
        if block:
            old[:] = new
            changed = True
        blocks.append(block or unchanged(len(new)))

    digest = digest_of(pieces, change)
    return digest, b"".join(blocks) if changed else b""

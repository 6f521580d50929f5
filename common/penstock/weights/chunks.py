"""The chunks of a version's files, in which servers pass the version on from one to the next.

Owns the list of chunks and how a chunk lies in a file. Invariants: the chunks of a list cover every byte of its files
once, in order; no name in a list leads out of its folder. Whoever knows the digest of the list can take list and chunks
from anyone: each is compared with its digest before it is used.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import xxhash

from penstock.contracts import Contract
from penstock.contracts.weight_sources import Number
from penstock.errors import WeightsError
from penstock.weights.manifest import MANIFEST_NAME, WEIGHT_FILES

CONFIG_NAME = "config.json"
LEAST_CHUNK_BYTES = 2**16
MOST_CHUNK_BYTES = 2**22  # what a server sends in a millisecond or two: the price of each level of a tree
CHUNKS_PER_VERSION = 256  # if the limits allow it: a level of a tree then costs less than a hundredth of a copy
MAX_LIST_BYTES = 2**27  # of a model of 26 TB


class ChunkedFile(Contract, frozen=True):
    """A file of a version: its name in the version's folder, and its size."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\Z")]
    num_bytes: Number


@dataclass(frozen=True)
class Chunk:
    """A piece of a file."""

    file: str
    start: int
    num_bytes: int
    digest: str


class ChunkList(Contract, frozen=True, tag_field="schema", tag="weights-chunks/1"):
    """The files of a version and the xxh3_64 of each of their chunks, in order; a file's last one may be shorter."""

    chunk_bytes: Annotated[int, msgspec.Meta(ge=1, le=MOST_CHUNK_BYTES)]
    files: tuple[ChunkedFile, ...]
    digests: tuple[str, ...]

    def __post_init__(self) -> None:
        expected = sum(-(-file.num_bytes // self.chunk_bytes) for file in self.files)
        if len(self.digests) != expected:
            raise ValueError(f"{len(self.digests)} digests: expected {expected}, one for each chunk of its files")

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    @property
    def chunks(self) -> list[Chunk]:
        extents = _extents(self.files, self.chunk_bytes)
        return [Chunk(*extent, digest) for extent, digest in zip(extents, self.digests, strict=True)]


def encode_list(chunks: ChunkList) -> tuple[bytes, str]:
    """A list as it travels, and the digest by which it is known."""
    data = msgspec.json.encode(chunks)
    return data, xxhash.xxh3_64_hexdigest(data)


def decode_list(data: bytes, digest: str) -> ChunkList:
    """The inverse; WeightsError if it is not the list of that digest."""
    if (seen := xxhash.xxh3_64_hexdigest(data)) != digest:
        raise WeightsError(f"the list of chunks ({len(data)} bytes) has digest {seen}: expected {digest}")
    try:
        return msgspec.json.decode(data, type=ChunkList)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"the list of chunks {digest} is not of schema weights-chunks/1: {error}; trainer and rollout services "
            "must be of one release"
        ) from error


def list_chunks(folder: Path) -> ChunkList:
    """The chunks of a staged version: its manifest first, its weights last. Reads every byte once."""
    names = [MANIFEST_NAME, CONFIG_NAME, *sorted(path.name for path in folder.glob(WEIGHT_FILES))]
    files = tuple(ChunkedFile(name, (folder / name).stat().st_size) for name in names if (folder / name).exists())
    fitting = sum(file.num_bytes for file in files) // CHUNKS_PER_VERSION
    chunk_bytes = min(MOST_CHUNK_BYTES, max(LEAST_CHUNK_BYTES, fitting))
    digests = []
    with OpenFiles(folder, [file.name for file in files]) as opened:
        for name, start, num_bytes in _extents(files, chunk_bytes):
            digests.append(xxhash.xxh3_64_hexdigest(opened.read(name, start, num_bytes)))
    return ChunkList(chunk_bytes, files, tuple(digests))


class OpenFiles:
    """Files of a folder, open while it lives: a reader is not disturbed if they lose their names."""

    def __init__(self, folder: Path, names: Sequence[str], flags: int = os.O_RDONLY) -> None:
        self._numbers: dict[str, int] = {}
        try:
            for name in names:
                self._numbers[name] = os.open(folder / name, flags, 0o600)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str, start: int, num_bytes: int) -> bytes:
        """These bytes of a file, or fewer if it ends earlier."""
        return os.pread(self._numbers[name], num_bytes, start)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write all of `data`; one system call may write only a part."""
        while data:
            written = os.pwrite(self._numbers[name], data, start)
            data, start = data[written:], start + written

    def close(self) -> None:
        numbers, self._numbers = self._numbers, {}
        for number in numbers.values():
            os.close(number)


def _extents(files: Sequence[ChunkedFile], chunk_bytes: int) -> list[tuple[str, int, int]]:
    return [
        (file.name, start, min(chunk_bytes, file.num_bytes - start))
        for file in files
        for start in range(0, file.num_bytes, chunk_bytes)
    ]

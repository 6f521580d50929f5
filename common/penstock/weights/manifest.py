"""The manifest of a version's weights: names, types, shapes and digests of its tensors.

Owns `manifest.json` and the digests. Invariant: a folder that `verify` accepts holds exactly the
tensors that were staged, bit for bit, and no other weight file that an engine would load. The
identity digest depends on names and tensor bytes only, so that equal weights have equal identities,
whether they arrived in full or as a delta: a manifest with a delta also describes the full weights.
Needs no torch. Written by the trainer, read by rollout services before they serve a version.
"""

import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from penstock.contracts import Contract, PolicyIdentity
from penstock.errors import WeightsError

MANIFEST_NAME = "manifest.json"
WEIGHT_FILES = "*.safetensors"
KEPT_VERSIONS = 3  # as files: the announced one, the one being pushed, the one being written
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1}


class TensorEntry(Contract, frozen=True):
    """One tensor: its file, its type by its safetensors name (BF16, F32), and the xxh3_64 of its bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


class TensorDelta(Contract, frozen=True):
    """The change of one tensor: bytes [start, start + num_bytes) of the delta's file, and their xxh3_64."""

    start: int
    num_bytes: int
    digest: str


class Delta(Contract, frozen=True):
    """A version as its changes since `base`, the name of another version's folder in the same folder.

    base_digest: that version's digest. tensors: the changed ones, encoded by `delta_codec`, in `file`.
    """

    base: str
    base_digest: str
    file: str
    tensors: dict[str, TensorDelta]

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.tensors.values())


class Manifest(Contract, frozen=True, tag_field="schema", tag="weights-manifest/1"):
    """A version's weights. `lease` is the trainer's; `files` are sizes in bytes by name.

    With a delta, `files` need not exist: they describe the result of the delta on its base.
    """

    version: int
    lease: int
    digest: str
    dtype: str
    files: dict[str, int]
    tensors: dict[str, TensorEntry]
    delta: Delta | None = None

    @property
    def identity(self) -> PolicyIdentity:
        return PolicyIdentity(self.version, self.digest)


def identity_digest(tensor_digests: Mapping[str, str]) -> str:
    """Digest of a version: xxh3_64 over "name digest" lines, sorted by name."""
    lines = (f"{name} {digest}\n" for name, digest in sorted(tensor_digests.items()))
    return xxhash.xxh3_64_hexdigest("".join(lines).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; WeightsError if it is missing or cannot be read."""
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}): expected the manifest of staged weights; "
            "weights.folder must be one folder that trainer and rollout servers share"
        ) from error
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(
            f"{path} ({len(data)} bytes) is not a manifest of schema weights-manifest/1: {error}; "
            "trainer and rollout services must be of one release"
        ) from error


def verify(folder: Path, manifest: Manifest) -> None:
    """Compare every byte of the folder's weights with the manifest; WeightsError names what differs."""
    _check_files(folder, manifest)
    for name in manifest.files:
        _check_tensors(folder / name, {key: each for key, each in manifest.tensors.items() if each.file == name})
    digest = identity_digest({name: entry.digest for name, entry in manifest.tensors.items()})
    if digest != manifest.digest:
        raise WeightsError(f"{folder / MANIFEST_NAME} names digest {manifest.digest}; its tensors give {digest}")


def _check_files(folder: Path, manifest: Manifest) -> None:
    found = {path.name: path.stat().st_size for path in folder.glob(WEIGHT_FILES)}
    if found != manifest.files:
        raise WeightsError(f"{folder} holds weight files (bytes) {found}: expected {manifest.files}")
    strays = sorted({entry.file for entry in manifest.tensors.values()} - manifest.files.keys())
    if strays:
        raise WeightsError(f"{folder / MANIFEST_NAME} names tensors in {strays}: expected only files it lists")


def tensor_bytes(path: Path, expected: Mapping[str, TensorEntry], *, writable: bool = False) -> dict[str, memoryview]:
    """The bytes of each tensor of a safetensors file, mapped; WeightsError if it does not hold the expected ones.

    The file stays mapped while any of them is in use, for instance by an error's traceback.
    """
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    with path.open("r+b" if writable else "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=access)
    header, data_start = _read_header(path, mapped)
    if header.keys() != expected.keys():
        raise WeightsError(
            f"{path}: tensors {sorted(header.keys() ^ expected.keys())[:3]} are not in both it and "
            "the manifest: expected the same names"
        )
    data = memoryview(mapped)[data_start:]
    extents = {name: _extent(path, name, header[name], entry, len(data)) for name, entry in expected.items()}
    return {name: data[start:end] for name, (start, end) in extents.items()}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, by its header; WeightsError if it is none or ends too early."""
    if path.stat().st_size == 0:  # which cannot be mapped
        raise WeightsError(f"{path} is empty: expected a safetensors file")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        header, data_start = _read_header(path, mapped)
        num_bytes = len(mapped) - data_start
    try:
        end = max((int(record["data_offsets"][1]) for record in header.values()), default=0)
        shapes = {name: tuple(map(int, record["shape"])) for name, record in header.items()}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: the record of a tensor is malformed ({error!r}): expected a safetensors file"
        ) from error
    if end > num_bytes:
        raise WeightsError(f"{path} holds {num_bytes} bytes of tensors: expected {end}; it is not complete")
    return shapes


def _check_tensors(path: Path, expected: Mapping[str, TensorEntry]) -> None:
    for name, tensor in tensor_bytes(path, expected).items():
        digest = xxhash.xxh3_64_hexdigest(tensor)
        if digest != expected[name].digest:
            raise WeightsError(
                f"{path}: tensor {name} has digest {digest}: expected {expected[name].digest}; "
                "the file was damaged or is still being written"
            )


def _read_header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    """Tensor records of a safetensors file by name, and where its data begins."""
    length = struct.unpack("<Q", mapped[:8])[0] if len(mapped) >= 8 else len(mapped)
    if length > min(MAX_HEADER_BYTES, len(mapped) - 8):
        raise WeightsError(f"{path} ({len(mapped)} bytes) has a header of {length} bytes: expected a safetensors file")
    try:
        header = json.loads(mapped[8 : 8 + length])
    except ValueError as error:
        raise WeightsError(f"{path}: the header is not JSON ({error}): expected a safetensors file") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the header is {type(header).__name__}: expected a safetensors file")
    header.pop("__metadata__", None)
    return header, 8 + length


def _extent(path: Path, name: str, record: Any, entry: TensorEntry, data_bytes: int) -> tuple[int, int]:
    try:
        seen = record["dtype"], tuple(record["shape"])
        start, end = record["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: the record of tensor {name} is malformed: {record}") from error
    if seen != (entry.dtype, entry.shape):
        raise WeightsError(f"{path}: tensor {name} is {seen}: expected {(entry.dtype, entry.shape)}")
    num_bytes = DTYPE_BYTES.get(entry.dtype, 0)
    for size in entry.shape:
        num_bytes *= size
    if (
        not (isinstance(start, int) and isinstance(end, int))
        or not 0 <= start <= end <= data_bytes
        or (end - start != num_bytes)
    ):
        raise WeightsError(
            f"{path}: tensor {name} lies at [{start}, {end}) of {data_bytes} bytes: expected {num_bytes} bytes within"
        )
    return start, end

"""Compares the checksums of the engine's tensors with the files that they were loaded from.

Owns how SGLang names and joins tensors: projections that it multiplies together are one tensor, their rows one after
another, and vocabularies are padded with rows of zeros. SGLang's checksum on a CPU is the first 8 bytes of a SHA-256.
On a GPU it is another hash, which this module cannot compute. Invariant: a tensor is either compared in every bit, or
left out because its place in the files is unknown. Blocking.
"""

import hashlib
import json
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.errors import WeightsMismatchError
from penstock.weights.manifest import WEIGHT_FILES

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
PADDED_ROWS = 64  # the number of rows of embedding and head is a multiple of this
HEX_DIGITS = 16


def check_checksums(folder: Path, reported: Mapping[str, str]) -> int:
    """Compare; returns how many tensors were compared. WeightsMismatchError names those that differ from the files.

    `reported`: the engine's name of each tensor and its checksum.
    """
    with _Files(folder) as files:
        expected = {name: files.checksum(name) for name in reported}
    compared = {name: checksum for name, checksum in expected.items() if checksum}
    differing = sorted(name for name, checksum in compared.items() if checksum != reported[name])
    if differing or (reported and not compared):
        raise WeightsMismatchError(
            f"the engine holds {len(differing)} of {len(compared)} tensors with other bytes than {folder}, first "
            f"{differing[:3]}: expected what was loaded from there; weights.checksums compares them"
        )
    return len(compared)


class _Files:
    """The tensors of a folder by name, mapped."""

    def __init__(self, folder: Path) -> None:
        self._maps: list[mmap.mmap] = []
        self._tensors: dict[str, tuple[mmap.mmap, int, int, Sequence[int]]] = {}
        for path in sorted(folder.glob(WEIGHT_FILES)):
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps.append(mapped)
            start = 8 + struct.unpack("<Q", mapped[:8])[0]
            records: dict[str, Any] = json.loads(mapped[8:start])
            for name, record in records.items():
                if name != "__metadata__":
                    begin, end = record["data_offsets"]
                    self._tensors[name] = (mapped, start + begin, start + end, record["shape"])

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for mapped in self._maps:
            mapped.close()

    def checksum(self, name: str) -> str:
        """The checksum that the engine's tensor `name` must have; empty if its parts are not known."""
        parts = [self._tensors[part] for part in self._parts(name)]
        digest = hashlib.sha256()
        for mapped, begin, end, shape in parts:
            with memoryview(mapped) as data, data[begin:end] as tensor:
                digest.update(tensor)
            if name.endswith((EMBEDDING, HEAD)) and shape[0]:
                digest.update(bytes((end - begin) // shape[0] * (-shape[0] % PADDED_ROWS)))
        return digest.hexdigest()[:HEX_DIGITS] if parts else ""

    def _parts(self, name: str) -> list[str]:
        if name in self._tensors:
            return [name]
        if name.endswith(HEAD):  # tied
            return [each for each in self._tensors if each.endswith(EMBEDDING)]
        module, _, leaf = name.rpartition(".")
        before, _, joined = module.rpartition(".")
        parts = [f"{before}.{part}.{leaf}" for part in JOINED.get(joined, ())]
        return parts if all(part in self._tensors for part in parts) else []

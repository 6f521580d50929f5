"""A full copy of the version that was served last, to which deltas are applied.

Owns the files that the engine loads, in a folder of this process on its own host. Invariant: a folder that `bring`
returns holds exactly the wanted version: all that was read is compared with its digest, and so is every changed
tensor. One tensor's changes are in memory at a time.

    wanted -> delta -> delta -> the version held here, or one with full files
    (the newest first; applied from the end)
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from msgspec.structs import replace

from penstock.errors import WeightsError
from penstock.weights.delta_codec import apply
from penstock.weights.local_folder import LocalFolder
from penstock.weights.manifest import (
    DTYPE_BYTES,
    WEIGHT_FILES,
    Manifest,
    TensorEntry,
    identity_digest,
    read_manifest,
    tensor_bytes,
    verify,
)

log = logging.getLogger(__name__)

UNSIGNED = {2: np.uint16, 4: np.uint32}


class ChainError(WeightsError):
    """No chain of deltas leads to the wanted version: its files are missing or damaged."""


@dataclass(frozen=True)
class Link:
    """A staged version."""

    folder: Path
    manifest: Manifest

    @property
    def is_full(self) -> bool:
        return all((self.folder / name).exists() for name in self.manifest.files)

    @property
    def full_bytes(self) -> int:
        return sum(self.manifest.files.values())


class LocalCopy:
    """The copy of one rollout service."""

    def __init__(self, claim: Callable[[int], LocalFolder]) -> None:
        """`claim`: bytes needed -> the folder of the copy."""
        self._claim = claim
        self._folder: LocalFolder | None = None
        self._held: Manifest | None = None

    def bring(self, staged: Path, wanted: Manifest) -> Path:
        """The folder with all of `wanted`, which is staged in `staged`. ChainError: no chain leads to it."""
        link = Link(staged, wanted)
        if self._folder is None:
            self._folder = self._claim(link.full_bytes)
        try:
            if self._held is None or self._held.digest != wanted.digest:
                self._follow(link)
            config = staged / "config.json"
            if config.exists():
                shutil.copyfile(config, self._folder.path / config.name)
        except OSError as error:
            raise ChainError(
                f"{error.filename}: {error.strerror} while version {wanted.version} was copied to {self._folder.path}: "
                "expected readable files in weights.folder, and room in weights.local_folder"
            ) from error
        return self._folder.path

    def close(self) -> None:
        """Remove the copy."""
        self._held = None
        if self._folder is not None:
            self._folder.release()
            self._folder = None

    def _follow(self, wanted: Link) -> None:
        """From the held version if that is less to read; otherwise, or if that fails, from a full version."""
        if (links := self._from_held(wanted)) is not None:
            try:
                self._apply(links)
                return
            except (WeightsError, OSError) as error:
                log.warning("%s; trying from a full version", error)
        full, *links = _from_full(wanted)
        self._copy(full)
        self._apply(links)

    def _from_held(self, wanted: Link) -> list[Link] | None:
        """The deltas from the held version to `wanted`, the oldest first; None if that is no shorter way."""
        links: list[Link] = []
        num_bytes = 0
        try:
            for link in _back(wanted):
                if self._held is None or num_bytes > wanted.full_bytes:
                    return None
                if link.manifest.digest == self._held.digest:
                    return links[::-1]
                num_bytes += link.manifest.delta.num_bytes if link.manifest.delta else 0
                links.append(link)
        except WeightsError as error:
            log.info("%s; starting from a full version", error)
        return None

    def _copy(self, link: Link) -> None:
        """Hold a version from its full files."""
        assert self._folder is not None
        self._held = None
        for stale in self._folder.path.glob(WEIGHT_FILES):
            stale.unlink()  # not written over: an engine that was given up may still have it mapped
        for name in link.manifest.files:
            shutil.copyfile(link.folder / name, self._folder.path / name)
        try:
            verify(self._folder.path, link.manifest)
        except WeightsError as error:
            raise ChainError(f"{error}; copied from {link.folder}") from error
        self._held = link.manifest

    def _apply(self, links: list[Link]) -> None:
        """Apply the deltas of the links to the held version."""
        if not links:
            return
        assert self._folder is not None
        assert self._held is not None
        held, self._held = self._held, None
        wanted = links[-1].manifest
        tensors = {
            name: tensor
            for file in held.files
            for name, tensor in tensor_bytes(
                self._folder.path / file,
                {name: entry for name, entry in held.tensors.items() if entry.file == file},
                writable=True,
            ).items()
        }
        changed = {name for link in links for name in _apply_delta(link, held, tensors)}
        found = {
            name: replace(entry, digest=xxhash.xxh3_64_hexdigest(tensors[name])) if name in changed else entry
            for name, entry in held.tensors.items()
        }
        _compare(links[-1], found)
        self._held = wanted


def _back(link: Link) -> Iterator[Link]:
    """A version, the one that its delta is to, and so on; ChainError if one is missing or not the expected one."""
    while True:
        yield link
        delta = link.manifest.delta
        if delta is None:
            return
        folder = link.folder.parent / delta.base
        try:
            manifest = read_manifest(folder)
        except WeightsError as error:
            raise ChainError(
                f"{error}; expected digest {delta.base_digest} there, which the delta in {link.folder} is to"
            ) from error
        if manifest.digest != delta.base_digest:
            raise ChainError(
                f"{folder} has digest {manifest.digest}: expected {delta.base_digest}, which the delta in "
                f"{link.folder} is to"
            )
        link = Link(folder, manifest)


def _from_full(wanted: Link) -> list[Link]:
    """The nearest version with full files, and the deltas from it to `wanted`."""
    links: list[Link] = []
    for link in _back(wanted):
        links.append(link)
        if link.is_full:
            return links[::-1]
    raise ChainError(
        f"{links[-1].folder} holds neither a delta nor {sorted(links[-1].manifest.files)}: expected full weights of "
        f"digest {links[-1].manifest.digest}"
    )


def _apply_delta(link: Link, held: Manifest, tensors: dict[str, memoryview]) -> list[str]:
    """Change tensors by one link's delta; the names of those that changed."""
    delta = link.manifest.delta
    assert delta is not None
    path = link.folder / delta.file
    with path.open("rb") as file:
        for name, entry in delta.tensors.items():
            if name not in tensors:
                raise ChainError(f"{path}: its manifest names tensor {name}: expected one of the {len(tensors)} held")
            file.seek(entry.start)
            data = file.read(entry.num_bytes)
            if (digest := xxhash.xxh3_64_hexdigest(data)) != entry.digest:
                raise ChainError(
                    f"{path}: the delta of tensor {name} has digest {digest} ({len(data)} bytes): expected "
                    f"{entry.digest} ({entry.num_bytes} bytes); the file was damaged or is still being written"
                )
            bits_N = np.frombuffer(tensors[name], UNSIGNED[DTYPE_BYTES[held.tensors[name].dtype]])
            try:
                apply(bits_N, memoryview(data))
            except ValueError as error:
                raise ChainError(f"{path}: the delta of tensor {name} is malformed: {error}") from error
    return list(delta.tensors)


def _compare(wanted: Link, found: dict[str, TensorEntry]) -> None:
    """ChainError unless these are the tensors of the wanted version."""
    expected = wanted.manifest.tensors
    if found != expected:
        name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ChainError(
            f"{wanted.folder}: tensor {name} is {found.get(name)} after its deltas: expected {expected.get(name)}"
        )
    digest = identity_digest({name: entry.digest for name, entry in found.items()})
    if digest != wanted.manifest.digest:
        raise ChainError(f"{wanted.folder}: its manifest names digest {wanted.manifest.digest}; its tensors {digest}")

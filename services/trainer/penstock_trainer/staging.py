"""Stages versions: folders with weights and manifest that rollout servers load.

Owns the folder `weights.folder`. Invariant: a folder with its final name is complete and never
changes; the last `keep` versions exist. A memory-backed folder is not flushed: after a crash of the
host the trainer stages again; there a removed version's file is written again for the next one.
Called by the loop, in a thread.
"""

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import msgspec
import xxhash

from penstock.contracts import PolicyIdentity
from penstock.errors import ConfigError, WeightsError
from penstock.manifest import MANIFEST_NAME, Manifest, identity_digest
from penstock_trainer.spare_file import SpareFile
from penstock_trainer.weight_files import WEIGHTS_NAME, Dtype, Format, Weights, digests, write_weights

SHARED_MEMORY = Path("/dev/shm")
MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "hugetlbfs"}
TEMPORARY_PREFIX = ".staging-"
SPARE_NAME = ".spare"


class WeightsSource(Protocol):
    """What is staged: the learner."""

    def weights(self) -> Weights: ...

    def config_json(self, dtype: Dtype) -> bytes: ...


class Staging:
    """The staged versions of one run."""

    def __init__(self, source: WeightsSource, folder: Path, form: Format, *, keep: int = 3) -> None:
        """`keep`: versions that stay; servers load the announced one, which is at most the second newest."""
        self._source = source
        self._folder = folder
        self._form = form
        self._keep = keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"weights.folder {folder} cannot be created ({error.strerror}): expected one that can be written to"
            ) from error
        self._durable = not is_memory_backed(folder)
        self._spare = SpareFile(folder / SPARE_NAME)
        for left_over in folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(left_over)

    def folder_of(self, version: int, lease: int) -> Path:
        """Where a version is, or will be, staged."""
        return self._folder.resolve() / f"{version:08d}.{lease}"

    def digest(self, version: int) -> PolicyIdentity:
        """The identity that staging the present weights as `version` would give; writes nothing."""
        return PolicyIdentity(version, identity_digest(digests(self._source.weights(), self._form)))

    def write(self, version: int, lease: int) -> PolicyIdentity:
        """Stage the present weights as `version`, and remove versions that are no longer kept."""
        target = self.folder_of(version, lease)
        temporary = self._folder / f"{TEMPORARY_PREFIX}{target.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        self.prune(self._newest(self._keep - 1))
        try:
            temporary.mkdir()
            self._spare.give(temporary / WEIGHTS_NAME)
            manifest = self._fill(temporary, version, lease)
            if target.exists():  # staged before by a life of the trainer that then ended
                shutil.rmtree(target)
            temporary.rename(target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise WeightsError(
                f"version {version} cannot be staged in {self._folder} ({error.strerror}): expected room for "
                f"{self._keep} copies of the weights; set weights.folder to a larger one"
            ) from error
        if self._durable:
            _flush_folder(self._folder)
        return manifest.identity

    def prune(self, kept: Collection[int]) -> None:
        """Remove every staged version that is not in `kept`. A reader that has its files open still sees them."""
        for version, path in self._staged():
            if version not in kept:
                if not self._durable:
                    self._spare.keep(path / WEIGHTS_NAME)
                shutil.rmtree(path)

    def close(self) -> None:
        """Remove everything: a later trainer stages its weights again before it announces them."""
        self.prune(set())
        self._spare.drop()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _fill(self, folder: Path, version: int, lease: int) -> Manifest:
        weights = self._source.weights()
        tensors = write_weights(folder / WEIGHTS_NAME, weights, self._form, durable=self._durable)
        (folder / "config.json").write_bytes(self._source.config_json(self._form.dtype))
        manifest = Manifest(
            version=version,
            lease=lease,
            digest=identity_digest({name: entry.digest for name, entry in tensors.items()}),
            dtype=self._form.dtype,
            files={WEIGHTS_NAME: (folder / WEIGHTS_NAME).stat().st_size},
            tensors=tensors,
        )
        with (folder / MANIFEST_NAME).open("wb") as file:
            file.write(msgspec.json.encode(manifest))
            file.flush()
            if self._durable:
                os.fsync(file.fileno())
        if self._durable:
            _flush_folder(folder)
        return manifest

    def _staged(self) -> list[tuple[int, Path]]:
        names = [(path.name.partition(".")[0], path) for path in self._folder.iterdir()]
        return [(int(number), path) for number, path in names if number.isdecimal()]

    def _newest(self, count: int) -> set[int]:
        return set(sorted({version for version, _ in self._staged()})[-count:]) if count else set()


def default_folder(run_name: str, run_folder: Path, needed_bytes: int) -> Path:
    """A memory-backed folder on this host if one has room for `needed_bytes`, else one in the run's folder."""
    if SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK) and is_memory_backed(SHARED_MEMORY):
        free_bytes = shutil.disk_usage(SHARED_MEMORY).free
        if free_bytes > needed_bytes:
            # Runs of one name in several folders must not meet.
            place = xxhash.xxh3_64_hexdigest(str(run_folder.resolve()).encode())[:8]
            return SHARED_MEMORY / f"penstock-{run_name}-{place}"
    return run_folder / "weights"


def is_memory_backed(folder: Path) -> bool:
    """Whether the folder's file system lives in memory (Linux; elsewhere False)."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return False
    resolved = folder.resolve()
    fields = [line.split(" ") for line in mounts.read_text().splitlines()]
    points = {Path(each[1].replace("\\040", " ")): each[2] for each in fields}
    nearest = next((path for path in (resolved, *resolved.parents) if path in points), None)
    return nearest is not None and points[nearest] in MEMORY_FILE_SYSTEMS


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

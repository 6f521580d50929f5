"""Stages versions: folders with weights and manifest that rollout servers load.

Owns the folder `weights.folder`. Invariant: a folder with its final name is complete and never changes, except that the
full weights may be added to a delta; the last `keep` versions exist, and the bases of their deltas. A memory-backed
folder is not flushed, because the trainer stages again after a crash of the host; there the file of a removed version
is reused for the next one.
"""

import contextlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from penstock.contracts import Dtype, PolicyIdentity
from penstock.durable import missing, sync_folder
from penstock.errors import ConfigError, WeightsError
from penstock.weights.local_folder import is_memory_backed, name_of_run, shared_memory
from penstock.weights.manifest import MANIFEST_NAME, Manifest, identity_digest, read_manifest
from penstock_trainer.weights.deltas import DeltaWriter
from penstock_trainer.weights.files import WEIGHTS_NAME, Format, Weights, digests, write_weights
from penstock_trainer.weights.spare_file import SpareFile

TEMPORARY_PREFIX = ".staging-"
TEMPORARY_FULL = ".full.tmp"
SPARE_NAME = ".spare"
NAME = re.compile(r"(\d{8,})\.\d+")  # <version>.<lease>; all else in the folder may be of others

log = logging.getLogger(__name__)


class WeightsSource(Protocol):
    """The source of the weights: the learner."""

    def weights(self) -> Weights: ...

    def config_json(self, dtype: Dtype) -> bytes: ...


class Staging:
    """The staged versions of one run."""

    def __init__(
        self,
        source: WeightsSource,
        folder: Path,
        form: Format,
        *,
        keep: int = 3,
        deltas: DeltaWriter | None = None,
    ) -> None:
        """`keep`: versions that stay; servers load the announced one, which is at most the second newest.

        `deltas`: write only changes, and the full weights only if `deltas.full_is_due`.
        """
        self._source = source
        self._folder = folder
        self._form = form
        self._keep = keep
        self._deltas = deltas
        self._bases: dict[str, str] = {}  # folder of a delta -> folder of its base
        self._newest_folder: Path | None = None  # of this life
        self._lock = threading.Lock()  # `complete` is called while `write` runs
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
        """The folder of a version, staged or not."""
        return self._folder.resolve() / f"{version:08d}.{lease}"

    def digest(self, version: int) -> PolicyIdentity:
        """The identity that staging the current weights as `version` would give; writes nothing."""
        return PolicyIdentity(version, identity_digest(digests(self._source.weights(), self._form)))

    def write(self, version: int, lease: int) -> PolicyIdentity:
        """Stage the current weights as `version`, and remove versions that are no longer needed."""
        target = self.folder_of(version, lease)
        temporary = self._folder / f"{TEMPORARY_PREFIX}{target.name}"
        with self._lock:
            shutil.rmtree(temporary, ignore_errors=True)
            self.prune(self._newest(self._keep - 1))
            try:
                temporary.mkdir()
                manifest = self._fill(temporary, version, lease)
                if target.exists():  # staged by an earlier life of the trainer
                    shutil.rmtree(target)
                temporary.rename(target)
            except OSError as error:
                shutil.rmtree(temporary, ignore_errors=True)
                raise self._no_room(version, error) from error
            if self._durable:
                sync_folder(self._folder)
            self._newest_folder = target
        return manifest.identity

    def complete(self) -> None:
        """Add the full weights to the newest version if it is only a delta, for a server that cannot use that."""
        with self._lock:
            folder = self._newest_folder
            if self._deltas is None or folder is None or (folder / WEIGHTS_NAME).exists():
                return
            log.warning("a server cannot use the deltas up to %s: adding the full weights", folder.name)
            temporary = folder / TEMPORARY_FULL
            try:
                self._deltas.copy_full(temporary, durable=self._durable)
                temporary.replace(folder / WEIGHTS_NAME)
            except OSError as error:
                raise self._no_room(int(folder.name.partition(".")[0]), error) from error
            if self._durable:
                sync_folder(folder)

    def prune(self, kept: Collection[int]) -> None:
        """Remove every staged version, except those in `kept` and the bases of their deltas.

        A reader that has files of a removed version open can still read them.
        """
        staged = self._staged()
        needed = {name for version, path in staged if version in kept for name in self._chain(path)}
        for _, path in staged:
            if path.name not in needed:
                if not self._durable:
                    self._spare.keep(path / WEIGHTS_NAME)
                shutil.rmtree(path)
                self._bases.pop(path.name, None)

    def close(self) -> None:
        """Remove everything: a later trainer stages its weights again before it announces them."""
        with self._lock:
            self.prune(set())
            self._newest_folder = None
            self._spare.drop()
            if self._deltas is not None:
                self._deltas.close()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _fill(self, folder: Path, version: int, lease: int) -> Manifest:
        weights, full_path = self._source.weights(), folder / WEIGHTS_NAME
        delta = None
        if self._deltas is None:
            self._spare.give(full_path)
            tensors = write_weights(full_path, weights, self._form, durable=self._durable)
            full_bytes = full_path.stat().st_size
        else:
            name = self.folder_of(version, lease).name
            tensors, delta = self._deltas.write(folder, name, weights, durable=self._durable)
            full_bytes = self._deltas.copy_bytes
            if self._deltas.full_is_due:
                self._spare.give(full_path)
                self._deltas.copy_full(full_path, durable=self._durable)
            if delta is not None:
                self._bases[name] = delta.base
                log.info("version %d is staged as a delta", version, extra=_sizes(delta.num_bytes, full_bytes))
        (folder / "config.json").write_bytes(self._source.config_json(self._form.dtype))
        manifest = Manifest(
            version=version,
            lease=lease,
            digest=identity_digest({name: entry.digest for name, entry in tensors.items()}),
            dtype=self._form.dtype,
            files={WEIGHTS_NAME: full_bytes},
            tensors=tensors,
            delta=delta,
        )
        with (folder / MANIFEST_NAME).open("wb") as file:
            file.write(msgspec.json.encode(manifest))
            file.flush()
            if self._durable:
                os.fsync(file.fileno())
        if self._durable:
            sync_folder(folder)
        return manifest

    def _chain(self, path: Path) -> Iterator[str]:
        """The folders from which a version is made: its own, then each base, back to the newest full version."""
        while True:
            yield path.name
            if (path / WEIGHTS_NAME).exists():
                return
            if path.name not in self._bases:  # of an earlier life
                try:
                    manifest = read_manifest(path)
                except WeightsError as error:
                    log.warning("%s; versions that it may need are not kept", error)
                    return
                if manifest.delta is None:
                    return
                self._bases[path.name] = manifest.delta.base
            path = self._folder / self._bases[path.name]

    def _no_room(self, version: int, error: OSError) -> WeightsError:
        room = f"room for {self._keep} copies of the weights; set weights.folder to a larger one"
        return WeightsError(
            f"version {version} cannot be staged in {self._folder} ({error.strerror}): {missing(error, room)}"
        )

    def _staged(self) -> list[tuple[int, Path]]:
        names = [(NAME.fullmatch(path.name), path) for path in self._folder.iterdir()]
        return [(int(name[1]), path) for name, path in names if name]

    def _newest(self, count: int) -> set[int]:
        return set(sorted({version for version, _ in self._staged()})[-count:]) if count else set()


def default_folder(run_name: str, run_folder: Path, needed_bytes: int) -> Path:
    """A memory-backed folder on this host if one has room for `needed_bytes`, else one in the run's folder."""
    memory = shared_memory(needed_bytes)
    return memory / name_of_run(run_name, run_folder) if memory else run_folder / "weights"


def _sizes(delta_bytes: int, full_bytes: int) -> dict[str, int]:
    return {"delta_bytes": delta_bytes, "full_bytes": full_bytes}

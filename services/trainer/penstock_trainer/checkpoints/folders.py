"""Checkpoints: the full state from which training goes on exactly as without a restart.

Owns the folders `checkpoints/<steps>.<lease>/`: tensors (`tensors`) and `checkpoint.json`. Invariants: a folder
with its final name is complete and flushed; it counts once the ledger names it. What has another name there, such as a
user's copy, is left alone.
"""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from penstock.contracts import Contract
from penstock.contracts.ledger import CheckpointRecord
from penstock.durable import sync_folder, write_durably, writing
from penstock_trainer.checkpoints.tensors import unreadable

META = "checkpoint.json"
NAME = re.compile(r"\d{8,}\.\d+")
TEMPORARY = re.compile(rf"\.{NAME.pattern}\.\d+\.tmp")


class CheckpointMeta(Contract, frozen=True, tag_field="schema", tag="checkpoint/2"):
    """The content of a checkpoint: `version` weights after `steps` steps; ticket state for people and branches.

    files: name and bytes of each other file, so that a missing or truncated one is detected before it is used.
    """

    steps: int
    version: int
    lease: int
    next_number: int
    outstanding: tuple[int, ...]
    files: dict[str, int] = msgspec.field(default_factory=dict)


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def begin(self, meta: CheckpointMeta) -> Path:
        """An empty folder for the tensors, under a temporary name."""
        temporary = self._folder / f".{_name(meta)}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        with writing(f"checkpoint {temporary}"):
            temporary.mkdir(parents=True)
        return temporary

    def abandon(self, temporary: Path) -> None:
        """Remove what could not be completed: it would take room from the next attempt."""
        shutil.rmtree(temporary, ignore_errors=True)

    def complete(self, temporary: Path, meta: CheckpointMeta) -> CheckpointRecord:
        """Give the folder its name, after all tensors are in it; the record that makes it count."""
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        write_durably(temporary / META, msgspec.json.encode(msgspec.structs.replace(meta, files=files)))
        target = self._folder / _name(meta)
        shutil.rmtree(target, ignore_errors=True)
        with writing(f"checkpoint {target}"):
            temporary.replace(target)
            sync_folder(self._folder)
        return CheckpointRecord(meta.steps, target.name)

    def read(self, name: str) -> tuple[CheckpointMeta, Path]:
        """A checkpoint and its folder; DataError if it is not as it was written."""
        folder = self._folder / name
        try:
            meta = msgspec.json.decode((folder / META).read_bytes(), type=CheckpointMeta)
            sizes = {file: (folder / file).stat().st_size for file in meta.files}
        except (OSError, msgspec.DecodeError) as error:
            raise unreadable(folder, str(error)) from error
        for file, size in sizes.items():
            if size != meta.files[file]:
                raise unreadable(folder, f"{file} has {size} bytes, not {meta.files[file]}")
        return meta, folder

    def exists(self, record: CheckpointRecord) -> bool:
        return self.holds(record.name)

    def holds(self, name: str) -> bool:
        """Whether there is a complete one of this name, which may be a user's copy."""
        return (self._folder / name / META).is_file()

    def names(self) -> list[str]:
        """Names of the complete ones, the newest last, whether the ledger names them or not."""
        if not self._folder.is_dir():
            return []
        complete = [path.name for path in self._folder.iterdir() if NAME.fullmatch(path.name) and self.holds(path.name)]
        return sorted(complete, key=lambda name: [int(part) for part in name.split(".")])

    def newest(self, committed: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
        """Those that stay because they are the newest, and which a resume may need."""
        return list(committed[-self._keep :])

    def prune(self, committed: list[CheckpointRecord], also: Iterable[str] = ()) -> int:
        """Delete all of this run but the newest committed ones; steps of the oldest of these (0: none).

        also: names of others that stay.
        """
        kept = self.newest(committed)
        names = {record.name for record in kept} | {*also}
        for path in self._folder.iterdir():
            own = NAME.fullmatch(path.name) or TEMPORARY.fullmatch(path.name)
            if own and path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
        return kept[0].steps if kept else 0


def _name(meta: CheckpointMeta) -> str:
    return f"{meta.steps:08d}.{meta.lease}"

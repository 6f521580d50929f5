"""Checkpoints: everything needed to go on from a step exactly as if nothing had happened.

Owns `checkpoints/<steps>.<lease>/`: `state.pt` (model, optimizer, schedule, random state; tensors and plain values,
read with weights_only) and `checkpoint.json`. Written under a temporary name, flushed, renamed; it counts once the
ledger names it. Called by the loop and the resume.
"""

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import torch

from penstock.contracts import Contract
from penstock.errors import DataError
from penstock.ledger import CheckpointRecord
from penstock_trainer.step_files import sync_folder, write_durably


class CheckpointMeta(Contract, frozen=True, tag_field="schema", tag="checkpoint/1"):
    """What a checkpoint is of: `version` weights after `steps` steps; ticket state for people and branches."""

    steps: int
    version: int
    lease: int
    next_number: int
    outstanding: tuple[int, ...]


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, meta: CheckpointMeta, state: dict[str, Any]) -> CheckpointRecord:
        """Write durably; the record that makes it count. Blocking: call it in a thread."""
        name = f"{meta.steps:08d}.{meta.lease}"
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with (temporary / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        write_durably(temporary / "checkpoint.json", msgspec.json.encode(meta))
        target = self._folder / name
        shutil.rmtree(target, ignore_errors=True)
        temporary.replace(target)
        sync_folder(self._folder)
        return CheckpointRecord(meta.steps, name)

    def read(self, record: CheckpointRecord) -> tuple[CheckpointMeta, dict[str, Any]]:
        """A committed checkpoint; DataError when it is missing or unreadable."""
        folder = self._folder / record.name
        try:
            meta = msgspec.json.decode((folder / "checkpoint.json").read_bytes(), type=CheckpointMeta)
            with (folder / "state.pt").open("rb") as file:
                if not zipfile.is_zipfile(file):  # torch would take it for an older format and fail in any way
                    raise EOFError("state.pt is cut off or not a checkpoint")
                file.seek(0)
                state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, EOFError, msgspec.DecodeError, RuntimeError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"checkpoint {folder} cannot be read ({reason}); expected what the trainer wrote: restore the folder, "
                "or delete it to go on from an earlier one"
            ) from error
        return meta, state

    def exists(self, record: CheckpointRecord) -> bool:
        return (self._folder / record.name / "checkpoint.json").exists()

    def prune(self, committed: list[CheckpointRecord]) -> int:
        """Delete all but the newest committed ones; steps of the oldest one kept (0: none)."""
        kept = committed[-self._keep :]
        names = {record.name for record in kept}
        for path in self._folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)
        return kept[0].steps if kept else 0

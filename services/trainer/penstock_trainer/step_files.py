"""Step files: the groups of one closed batch, so that a step can be trained again without any rollout server.

Owns `steps/<step>.<lease>.pack`: written whole, flushed, renamed; it counts once the ledger names it. Called by the
loop before the commit, by the resume after a restart.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import xxhash

from penstock.contracts import Contract, ScoredGroup
from penstock.errors import DataError
from penstock.ledger import StepRecord


class StepFile(Contract, frozen=True, tag_field="schema", tag="step-file/1"):
    """The inputs of one step, in the order in which they are trained."""

    step: int
    lease: int
    groups: tuple[ScoredGroup, ...]


class StepFiles:
    """The step files of a run."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        self._folder = folder
        self._keep_bytes = keep_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        step: int,
        lease: int,
        groups: Sequence[ScoredGroup],
        *,
        version: int | None = None,
        max_lag: int | None = None,
    ) -> StepRecord:
        """Write a batch durably, whole and unmasked; the record that commits it."""
        data = msgspec.msgpack.encode(StepFile(step, lease, tuple(groups)))
        name = f"{step:08d}.{lease}.pack"
        write_durably(self._folder / name, data)
        tickets = tuple(each.group.ticket.number for each in groups)
        return StepRecord(step, tickets, name, xxhash.xxh3_64_hexdigest(data), version, max_lag)

    def read(self, record: StepRecord) -> tuple[ScoredGroup, ...]:
        """The groups of a committed step; DataError when the file is missing or not what was committed."""
        path = self._folder / record.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"step {record.step}: {path} cannot be read ({error.strerror}); it is needed to resume"
            ) from None
        digest = xxhash.xxh3_64_hexdigest(data)
        if digest != record.digest:
            raise DataError(f"step {record.step}: {path} has digest {digest}; the ledger says {record.digest}")
        return msgspec.msgpack.decode(data, type=StepFile).groups

    def highest_lease(self) -> int:
        """The highest lease that wrote a step here, committed or not; 0 where there is none."""
        return max((int(path.name.split(".")[1]) for path in self._folder.glob("*.pack")), default=0)

    def prune(self, oldest_needed: int) -> None:
        """Delete the oldest files above the byte limit, never one that a kept checkpoint needs."""
        files = sorted(self._folder.glob("*.pack"))
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self._keep_bytes or int(path.name.partition(".")[0]) >= oldest_needed:
                return
            total -= path.stat().st_size
            path.unlink()


def write_durably(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to the disk, rename: a reader sees all of it or nothing."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

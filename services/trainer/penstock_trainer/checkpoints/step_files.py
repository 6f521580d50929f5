"""Step files: the groups of one closed batch, so that a step can be trained again without any rollout server.

Owns `steps/<step>.<lease>.pack`: written in full, flushed, renamed; it counts once the ledger names it. Beside it, once
the step is trained, `<step>.<lease>.log_ratios`, which only readers use: a crash may lose it, and it goes with its step
file. The same folder holds the journal, which names the files that count when the queue is gone, and the steps'
settings.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import xxhash

from penstock.contracts import ScoredGroup
from penstock.contracts.ledger import Outcome, StepRecord
from penstock.contracts.log_ratios import SUFFIX, LogRatiosFile
from penstock.contracts.step_file import StepFile
from penstock.durable import write_complete, write_durably, writing
from penstock.errors import DataError
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.checkpoints.settings import SettingsFiles

NAME = re.compile(r"(\d{8,})\.(\d+)\.pack")


class StepFiles:
    """The step files of a run."""

    def __init__(self, folder: Path, keep_bytes: int) -> None:
        self._folder = folder
        self._keep_bytes = keep_bytes
        self.journal = Journal(folder)
        self.settings = SettingsFiles(folder)

    def write(
        self,
        step: int,
        lease: int,
        groups: Sequence[ScoredGroup],
        *,
        version: int | None = None,
        max_lag: int | None = None,
        settings: str = "",
        outcomes: tuple[Outcome, ...] = (),
    ) -> StepRecord:
        """Write the full batch durably, without masks; the record that commits it.

        settings: digest of the step's. outcomes: of its tickets, for a curriculum.
        """
        with writing(str(self._folder)):
            self._folder.mkdir(parents=True, exist_ok=True)
        data = msgspec.msgpack.encode(StepFile(step, lease, tuple(groups)))
        name = f"{step:08d}.{lease}.pack"
        write_durably(self._folder / name, data)
        tickets = tuple(each.group.ticket.number for each in groups)
        return StepRecord(step, tickets, name, xxhash.xxh3_64_hexdigest(data), version, max_lag, settings, outcomes)

    def write_log_ratios(self, record: StepRecord, groups: tuple[tuple[bytes, ...], ...]) -> None:
        """Write those of a committed step, unless an earlier life has written them. groups: see `LogRatiosFile`.

        Not flushed: if the host crashes, a reader lacks them. PenstockError if they cannot be written.
        """
        path = self._folder / Path(record.file).with_suffix(SUFFIX)
        if not path.exists():
            write_complete(path, msgspec.msgpack.encode(LogRatiosFile(record.step, record.digest, groups)))

    def read(self, record: StepRecord) -> tuple[ScoredGroup, ...]:
        """The groups of a committed step; DataError if the file is missing or is not the committed one."""
        path = self._folder / record.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(
                f"step {record.number}: {path} cannot be read ({error.strerror}); it is needed to resume"
            ) from None
        digest = xxhash.xxh3_64_hexdigest(data)
        if digest != record.digest:
            raise DataError(f"step {record.number}: {path} has digest {digest}; the ledger records {record.digest}")
        return msgspec.msgpack.decode(data, type=StepFile).groups

    @property
    def is_empty(self) -> bool:
        """Whether no step was written here, committed or not."""
        return not any(self._written())

    def exists(self, record: StepRecord) -> bool:
        """Whether the file of a committed step exists."""
        return (self._folder / record.file).is_file()

    def prune(self, oldest_needed: int) -> None:
        """Delete the oldest files above the byte limit with their log-ratios, but none that a kept checkpoint needs."""
        for path in self._folder.glob(f"*{SUFFIX}"):  # written after its step file was deleted
            if not path.with_suffix(".pack").exists():
                path.unlink(missing_ok=True)
        sizes = ((step, path, _size(path) + _size(path.with_suffix(SUFFIX))) for step, _, path in self._written())
        files = sorted(sizes)
        total = sum(size for _, _, size in files)
        for step, path, size in files:
            if total <= self._keep_bytes or step >= oldest_needed:
                return
            total -= size
            path.with_suffix(SUFFIX).unlink(missing_ok=True)
            path.unlink()

    def _written(self) -> Iterator[tuple[int, int, Path]]:
        """Step, lease and path of each file that a trainer wrote; a user's copies have other names."""
        for path in self._folder.glob("*.pack"):
            if (found := NAME.fullmatch(path.name)) is not None:
                yield int(found[1]), int(found[2]), path


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0

"""The journal: the ledger's records of steps and weights, in the run's folder, so that they outlive the queue.

Owns `steps/ledger.jsonl`: the records of the ledger as JSON lines. Invariant: a record is in the ledger before it is in
the journal, and weights are in the journal before they are pushed. Each start of a trainer writes the full journal anew
from the ledger, so it holds no record that the queue has lost, that a branch left behind or that a crash cut off; after
that each record follows that of the ledger. A step file that the journal does not name does not count.

    ledger (queue) --start--> all records       step k: file, commit, change, weights -> ledger -> a line each here

If the queue has lost the full ledger, the journal is the ledger: only what came after its last line is made again.

The oldest records of a long ledger go into `steps/archive.jsonl`; ledger and journal then begin with one record that
stands for them and names the length of the archive. Invariant: the archive holds them durably before that, and is never
changed below the length that the ledger names.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from penstock.contracts.ledger import LedgerState, Record, decode_record, encode_record, replay
from penstock.durable import sync_folder, write_durably, writing
from penstock.errors import DataError
from penstock.records.files import ARCHIVE_FILE, LEDGER_FILE
from penstock.records.ledger_files import archived_records


class Journal:
    """The journal in a folder of step files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE

    def begin(self, ledger: LedgerState) -> None:
        """Write the records of the ledger."""
        with writing(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.path, self.lines(ledger))

    def archive(self, records: Sequence[Record], after: int) -> int:
        """Add the oldest records of the ledger to the archive, which counts up to byte `after`; its new length."""
        path, data = self.path.with_name(ARCHIVE_FILE), _lines(records)
        with writing(str(path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                if (size := file.tell()) < after:
                    raise DataError(f"{path} has {size} bytes: expected the {after} of which the ledger knows")
                file.truncate(after)  # what an end of the process left there is in the ledger
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            sync_folder(path.parent)
        return after + len(data)

    @staticmethod
    def lines(ledger: LedgerState) -> bytes:
        """The content of the journal of a ledger."""
        return _lines(_records(ledger))

    def append(self, *records: Record, durable: bool = True) -> None:
        """Append records that the ledger has already; flush them to the disk, or leave that to a later call."""
        with writing(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(_lines(records))
                file.flush()
                if durable:
                    os.fsync(file.fileno())

    @property
    def exists(self) -> bool:
        return self.path.is_file()

    def read(self) -> LedgerState:
        """The state after its records. DataError if it cannot be read."""
        return replay(self.records())

    def history(self) -> LedgerState:
        """The state with all records of the run, those of the archive included. DataError if it cannot be read."""
        return self.with_archive(self.read())

    def with_archive(self, ledger: LedgerState) -> LedgerState:
        """The state of a ledger with the records that it has given to the archive."""
        if ledger.archived is None:
            return ledger
        num_bytes = ledger.archived.num_bytes
        with self._reading(self.path.with_name(ARCHIVE_FILE)):
            oldest = list(archived_records(self.path.parent, num_bytes))
        return replay([*oldest, *_records(ledger)[1:]])

    def records(self) -> list[Record]:
        """Its records, without a last line that a crash cut off. DataError if it cannot be read."""
        with self._reading(self.path):
            data = self.path.read_bytes()
            return [decode_record(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]

    @staticmethod
    @contextmanager
    def _reading(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{path} cannot be read ({error.strerror}): expected the records of the run's steps"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is damaged ({error}): expected one record of the ledger per line") from None


def _records(ledger: LedgerState) -> list[Record]:
    archived, checkpoints = ledger.archived, ledger.checkpoints
    begin: list[Record] = [each for each in (archived or ledger.run,) if each is not None]
    if archived is not None:
        checkpoints = [each for each in checkpoints if each not in archived.checkpoints]
    weights = [ledger.weights[steps] for steps in sorted(ledger.weights)]
    ends = [each for each in (ledger.early_stop,) if each is not None]
    return [*begin, *ledger.steps, *weights, *ledger.drops.values(), *checkpoints, *ends]


def _lines(records: Iterable[Record]) -> bytes:
    return b"".join(encode_record(record) + b"\n" for record in records)

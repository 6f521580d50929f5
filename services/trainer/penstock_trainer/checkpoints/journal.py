"""The journal: the ledger's records of steps and weights, in the run's folder, so that they outlive the queue.

Owns `steps/ledger.jsonl`: the records of the ledger as JSON lines. Invariant: a record is in the ledger before it is in
the journal, and weights are in the journal before they are pushed. Each start of a trainer writes the full journal anew
from the ledger, so it holds no record that the queue has lost, that a branch left behind or that a crash cut off; after
that each record follows that of the ledger. A step file that the journal does not name does not count.

    ledger (queue) --start--> all records       step k: file, commit, change, weights -> ledger -> a line each here

If the queue has lost the full ledger, the journal is the ledger: only what came after its last line is made again.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from penstock.contracts.ledger import (
    CheckpointRecord,
    LedgerState,
    Record,
    RunRecord,
    decode_record,
    encode_record,
    replay,
)
from penstock.durable import write_durably, writing
from penstock.errors import DataError
from penstock.records.files import LEDGER_FILE


class Journal:
    """The journal in a folder of step files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE

    def begin(self, ledger: LedgerState) -> None:
        """Write the records of the ledger."""
        with writing(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self.path, self.lines(ledger))

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

    def records(self) -> list[Record]:
        """Its records, without a last line that a crash cut off. DataError if it cannot be read."""
        try:
            data = self.path.read_bytes()
            lines = data[: data.rfind(b"\n") + 1].splitlines()
            return [decode_record(line) for line in lines]
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be read ({error.strerror}): expected the records of the run's steps"
            ) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} is damaged ({error}): expected one record of the ledger per line") from None


def _records(ledger: LedgerState) -> list[Record]:
    run: list[RunRecord] = [ledger.run] if ledger.run is not None else []
    checkpoints: list[CheckpointRecord] = ledger.checkpoints
    weights = [ledger.weights[steps] for steps in sorted(ledger.weights)]
    return [*run, *ledger.steps, *weights, *ledger.drops.values(), *checkpoints]


def _lines(records: Iterable[Record]) -> bytes:
    return b"".join(encode_record(record) + b"\n" for record in records)

"""All records of a run's ledger, from its folder of step files: those of the archive, then those of the journal.

Owns how the two files are read as one. Invariant: of the archive only as much counts as the journal names, so that what
a crash left behind it does not.
"""

from collections.abc import Iterator
from pathlib import Path

from penstock.contracts.ledger import ArchivedRecord, Record, decode_record
from penstock.errors import DataError
from penstock.records.files import ARCHIVE_FILE, LEDGER_FILE
from penstock.records.lines import complete_lines


def all_records(folder: Path) -> Iterator[Record]:
    """In an order that replays to the same state. DataError if the archive is shorter than the journal says."""
    for line in complete_lines(folder / LEDGER_FILE):
        record = decode_record(line)
        if isinstance(record, ArchivedRecord):
            yield from archived_records(folder, record.num_bytes)
        else:
            yield record


def archived_records(folder: Path, num_bytes: int) -> Iterator[Record]:
    """Those in the first `num_bytes` of the archive."""
    path, left = folder / ARCHIVE_FILE, num_bytes
    lines = complete_lines(path)
    while left > 0:
        line = next(lines, b"")
        left -= len(line)
        if not line or left < 0:
            raise DataError(f"{path} ends {abs(left)} bytes from where its journal says: expected {num_bytes} bytes")
        yield decode_record(line)

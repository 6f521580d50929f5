"""What a trainer knows of the lines of its steps up to a position in their file, so that a start reads only the rest.

Owns `steps_read.json`. Invariant: it is used only while the lines before its position are those that it is of, by their
length and the digest of the last ones; without it, or with one that is not of these lines, all lines are read.
"""

from pathlib import Path

import msgspec
import xxhash

from penstock.durable import write_durably
from penstock.records.files import STEPS_READ_FILE

DIGESTED_BYTES = 4096  # before the position: two lines at least


class LinesRead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """num_bytes: the position, after a complete line; digest: of the bytes before it. staleness_max: of all lines.

    written: the steps that have a line before the position, as [first, last + 1].
    """

    num_bytes: int = 0
    digest: str = ""
    num_steps: int = 0
    staleness_max: int = 0
    written: tuple[tuple[int, int], ...] = ()


def read_so_far(lines: Path) -> LinesRead:
    """What is known of the file of lines; of nothing, if that is not of these lines."""
    try:
        known = msgspec.json.decode(lines.with_name(STEPS_READ_FILE).read_bytes(), type=LinesRead)
    except (FileNotFoundError, msgspec.DecodeError):
        return LinesRead()
    return known if known.digest == _digest(lines, known.num_bytes) else LinesRead()


def keep(lines: Path, num_bytes: int, num_steps: int, staleness_max: int, written: list[range]) -> LinesRead:
    """Write what is known of the first `num_bytes` of the file of lines."""
    ranges = tuple((each.start, each.stop) for each in written)
    known = LinesRead(num_bytes, _digest(lines, num_bytes), num_steps, staleness_max, ranges)
    write_durably(lines.with_name(STEPS_READ_FILE), msgspec.json.encode(known))
    return known


def _digest(lines: Path, end: int) -> str:
    """Of the last bytes before a position; empty if the file does not reach it."""
    try:
        with lines.open("rb") as file:
            file.seek(max(0, end - DIGESTED_BYTES))
            data = file.read(min(end, DIGESTED_BYTES))
    except FileNotFoundError:
        return ""
    return xxhash.xxh3_64_hexdigest(data) if len(data) == min(end, DIGESTED_BYTES) else ""

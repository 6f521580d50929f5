"""A file in the run's folder that keeps its last lines, for people to read: `dropped.jsonl`, `dead.jsonl`.

Owns the file. Invariant: a line is written when what it tells of happens, so that it can be read while the run waits
for a reward that works. The file keeps the last lines: a service that is down for a night fills no disk.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from penstock.durable import writing
from penstock.records.lines import complete_lines, cut_unfinished_line

MOST_LINES = 200  # that are kept at least; with the longest texts 2 MB


class LastLines:
    """The last lines of one file, earlier lives of its trainer included."""

    def __init__(self, path: Path) -> None:
        self._path = path
        cut_unfinished_line(self._path)
        self._num_lines = sum(1 for _ in complete_lines(self._path))

    def add(self, lines: Sequence[msgspec.Struct]) -> None:
        """Write lines; the file is cut to its last lines when it has twice as many as it keeps."""
        if not lines:
            return
        with writing(str(self._path)):
            with self._path.open("ab") as file:
                file.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
            self._num_lines += len(lines)
            if self._num_lines >= 2 * MOST_LINES:
                self._shorten()

    def last(self) -> bytes:
        """The last line; empty if there is none."""
        return next(iter(deque(complete_lines(self._path), maxlen=1)), b"")

    def _shorten(self) -> None:
        last = deque(complete_lines(self._path), maxlen=MOST_LINES)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(last))
        temporary.replace(self._path)
        self._num_lines = len(last)

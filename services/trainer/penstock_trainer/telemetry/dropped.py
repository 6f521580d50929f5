"""`dropped.jsonl` in the run's folder: completions without a reward of groups that no step trains, for people to read.

Owns the file. Invariant: a line is written when its group is dropped, so that it can be read while the run waits for a
reward that works. The file keeps the last lines: a service that is down for a night fills no disk.
"""

from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

from penstock.durable import writing
from penstock.records.files import DROPPED_FILE
from penstock.records.lines import complete_lines, cut_unfinished_line
from penstock.records.samples import DroppedLine

MOST_LINES = 200  # that are kept at least; with the longest texts 2 MB


class DroppedFile:
    """The dropped completions of a run, earlier lives of its trainer included."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / DROPPED_FILE
        cut_unfinished_line(self._path)
        self._num_lines = sum(1 for _ in complete_lines(self._path))

    def add(self, lines: Sequence[DroppedLine]) -> None:
        """Write the lines of a group; the file is cut to its last lines when it has twice as many as it keeps."""
        if not lines:
            return
        with writing(str(self._path)):
            with self._path.open("ab") as file:
                file.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
            self._num_lines += len(lines)
            if self._num_lines >= 2 * MOST_LINES:
                self._shorten()

    def _shorten(self) -> None:
        last = deque(complete_lines(self._path), maxlen=MOST_LINES)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(last))
        temporary.replace(self._path)
        self._num_lines = len(last)

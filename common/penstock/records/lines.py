"""Files of one JSON document a line, to which one process appends while others read.

Invariant: a reader changes nothing, and a last line without its end is no line yet: its writer is at work, or has died.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

T = TypeVar("T")


BLOCK_BYTES = 2**16  # read at once by whoever looks for the end of a file


def complete_lines(path: Path, start: int = 0) -> Iterator[bytes]:
    """The lines in order, from a file that may not exist yet. `start`: bytes before the first one."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            yield line


def cut_unfinished_line(path: Path) -> None:
    """Remove a last line that a crash cut off. For the file's writer, before it appends. Reads only that line."""
    if not path.exists():
        return
    size = path.stat().st_size
    end = start_of_last_lines(path, size, 0)
    if end < size:
        with path.open("rb+") as file:
            file.truncate(end)


def start_of_last_lines(path: Path, end: int, count: int) -> int:
    """Where the last `count` complete lines before the position `end` begin; 0 if there are no more than these.

    With 0 lines: where the last complete one ends.
    """
    with path.open("rb") as file:
        while end > 0:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            block = file.read(end - start)
            while (newline := block.rfind(b"\n")) >= 0:
                if count == 0:
                    return start + newline + 1
                count -= 1
                block = block[:newline]
            end = start
    return 0


def decoded(line: bytes, expected: type[T]) -> T:
    """A line as `expected`. A figure may be NaN, which is no JSON and which only Python's parser reads."""
    try:
        return msgspec.json.decode(line, type=expected)
    except msgspec.DecodeError:
        return msgspec.convert(json.loads(line), expected)


def as_written(line: bytes) -> dict[str, Any]:
    """All that a line holds, by name."""
    return decoded(line, dict[str, Any])


class Tail:
    """The lines of a file as they are appended: each call of `new` returns those that came since the last one.

    If the queue of a run loses its last writes, the lines of these steps are removed, and the steps are trained anew:
    the file is replaced by a shorter one. Of a replaced file, what was returned before is not new; a step that was
    trained again is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None  # kept open, so that the file system gives its number to no other file
        self._end = 0
        self._returned: set[int] = set()

    def new(self) -> list[dict[str, Any]]:
        """Those since the last call, or all that there are."""
        try:
            status = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return []
        if self._file is None or not os.path.samestat(status, os.fstat(self._file.fileno())):
            self.close()
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                return []
        self._file.seek(self._end)
        return list(map(as_written, self._unreturned(self._file)))

    def close(self) -> None:
        """Let the file go; a later `new` reads it from its start, and returns what it never returned."""
        if self._file is not None:
            self._file.close()
        self._file, self._end = None, 0

    def _unreturned(self, file: BinaryIO) -> Iterator[bytes]:
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._end += len(line)
            if (seen := hash(line)) not in self._returned:
                self._returned.add(seen)
                yield line

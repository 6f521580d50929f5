"""Files of lines that grow while they are read: any line by its number, and the newest first.

Invariant: a file is read once, and then only what was appended. A file that was replaced or cut, as by a trainer that
trains steps again, is read anew from its start. Memory holds 8 bytes for each line.
"""

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

BLOCK_BYTES = 2**20  # read at once, backwards
LONGEST_LINE_BYTES = 2**24  # a line of samples.jsonl is below 64 kB; a file of another kind has none that ends


class LineIndex:
    """The complete lines of a file, by number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("q")
        self._end = 0
        self._identity: tuple[int, int] | None = None  # device and inode
        self._last_line = 0  # the digest of it, by which a file that was cut and written again is known

    def __len__(self) -> int:
        return len(self._starts)

    def new_lines(self, size: int | None = None) -> tuple[bool, Iterator[bytes]]:
        """Whether earlier lines no longer count, and the lines since the last call.

        size: bytes of the file that count; None: all. Who does not use them up calls `forget`: each line is counted
        as it is given.
        """
        try:
            file = self._path.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            replaced = bool(self._starts)
            self.forget()
            return replaced, iter(())
        status = os.fstat(file.fileno())
        replaced = bool(self._starts) and not self._continues(file, (status.st_dev, status.st_ino), status.st_size)
        if replaced:
            self.forget()
        self._identity = (status.st_dev, status.st_ino)
        return replaced, self._appended(file, size)

    def read(self, number: int) -> bytes:
        """A line that was counted before; empty if the file has been replaced since."""
        end = self._starts[number + 1] if number + 1 < len(self._starts) else self._end
        try:
            with self._path.open("rb") as file:
                file.seek(self._starts[number])
                return file.read(end - self._starts[number])
        except OSError:
            return b""

    def forget(self) -> None:
        """Begin anew: the next call reads the file from its start."""
        del self._starts[:]
        self._end, self._last_line, self._identity = 0, 0, None

    def _continues(self, file: BinaryIO, identity: tuple[int, int], size: int) -> bool:
        if identity != self._identity or size < self._end:
            return False
        file.seek(self._starts[-1])
        return xxhash.xxh3_64_intdigest(file.read(self._end - self._starts[-1])) == self._last_line

    def _appended(self, file: BinaryIO, size: int | None) -> Iterator[bytes]:
        with file:
            file.seek(self._end)
            line = b""
            for line in file:
                if not line.endswith(b"\n") or (size is not None and self._end + len(line) > size):
                    return
                self._starts.append(self._end)
                self._end += len(line)
                self._last_line = xxhash.xxh3_64_intdigest(line)
                yield line


def lines_before(path: Path, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Complete lines from byte `end` (None: of the file) backwards, each with the byte at which it starts."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        size = file.seek(0, os.SEEK_END)
        start = size if end is None else min(max(end, 0), size)
        rest = b""  # of a line that starts further up
        while start > 0 and len(rest) < LONGEST_LINE_BYTES:
            length = min(BLOCK_BYTES, start)
            start -= length
            file.seek(start)
            block = file.read(length) + rest
            first = block.find(b"\n") + 1 if start else 0
            if start and not first:
                rest = block
                continue
            yield from _backwards(block, first, start)
            rest = block[:first]


def _backwards(block: bytes, first: int, offset: int) -> Iterator[tuple[int, bytes]]:
    """The complete lines of a block behind its byte `first`, the last one first."""
    end = block.rfind(b"\n") + 1
    while end > first:
        begin = max(block.rfind(b"\n", first, end - 1) + 1, first)
        yield offset + begin, block[begin:end]
        end = begin

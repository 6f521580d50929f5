"""Lines for people on standard output and error, which may be gone.

`head` may have read enough, a terminal may be closed, the disk that a log is on may be full. Invariant: none of these
ends the work of a process, and an exit code that has another reason stays.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable
from typing import TextIO

UNREAD_EXIT_CODE = 128 + signal.SIGPIPE  # as a shell reports a program that wrote into a closed pipe
UNWRITTEN_EXIT_CODE = 1


def complain(line: str) -> None:
    """A line on standard error, if it can be written."""
    _write([line], sys.stderr)


def tell(lines: Iterable[str]) -> None:
    """Lines on standard output, as far as they can be written."""
    _write(lines, sys.stdout)


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is; None if it is none, such as a pipe or a file.

    COLUMNS, which some shells and tools export, is of the moment when it was set, and is not used.
    """
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def flushed(exit_code: int) -> int:
    """The exit code of a command whose output is all it has to give: 0 only if the output was written.

    What a library could not write on standard error changes no exit code.
    """
    _write([], sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        return exit_code or UNREAD_EXIT_CODE
    except OSError as error:
        _discard(sys.stdout)
        complain(f"penstock: error: standard output cannot be written ({error.strerror})")
        return exit_code or UNWRITTEN_EXIT_CODE
    return exit_code


def _write(lines: Iterable[str], stream: TextIO) -> None:
    try:
        for line in lines:
            print(line, file=stream, flush=True)
        stream.flush()
    except OSError:
        _discard(stream)


def _discard(stream: TextIO) -> None:
    """Let what is still held back go nowhere: at its exit Python would fail on it, with an exit code of its own."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

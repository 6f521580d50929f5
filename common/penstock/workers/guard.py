"""Kills what users' programs started if their service is killed: a helper that outlives the service by a moment.

The kernel ends a tied process with its service, but not the processes that it has started. Invariant: once a group is
watched, none of its processes outlives the service, however that ends, but those that left the group.

One helper for all groups of a service. Its input says which they are, and ends with the service. A helper that is lost
(the kernel may kill it if memory is short) is replaced at the next change. Also runs as a script, and so imports only
the standard library.
"""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # the helper only has to read the end of its input


class GroupGuard:
    """Keeps the helper informed. Leaving `with` ends the helper, which kills the groups that were not released."""

    def __init__(self) -> None:
        """OSError if it cannot be started."""
        self._groups: set[int] = set()
        self._process = _start_helper()

    def watch(self, group: int) -> None:
        """Kill this process group if the service ends."""
        self._groups.add(group)
        self._send(f"+{group}\n")

    def release(self, group: int) -> None:
        """The group has ended; its number may become another's."""
        self._groups.discard(group)
        self._send(f"-{group}\n")

    def _send(self, line: str) -> None:
        try:
            self._write(line)
        except BrokenPipeError:
            self._end_helper()
            log.warning("the helper that guards process groups ended (%s): starting another", self._process.returncode)
            self._process = _start_helper()
            self._write("".join(f"+{group}\n" for group in self._groups))

    def _write(self, lines: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(lines.encode())
        self._process.stdin.flush()

    def _end_helper(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # of what a lost helper has not read
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_helper()


def _start_helper() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # what ends the service's own group must not end it first
    )


def left_at_the_end(lines: Iterable[str]) -> set[int]:
    """The groups that are watched and not released.

    >>> left_at_the_end(["+7\\n", "+8\\n", "-7\\n"])
    {8}
    """
    groups: set[int] = set()
    for line in lines:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    return groups


def main() -> None:
    """Wait for the end of the input, then kill."""
    for group in left_at_the_end(sys.stdin):
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue  # it has ended with the service


if __name__ == "__main__":
    main()

"""A terminal whose screen a test reads: a pseudo terminal, and an emulator of what it shows.

The command has it as its controlling terminal, so that Ctrl-C reaches it as a signal, by way of the kernel.
"""

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable

import pyte

from tests.integration.launch.launch_setup import until
from tests.patience import START_SECONDS

AS_LEADER = ("setsid", "--ctty")  # the command gets its standard input as its controlling terminal
SCROLLBACK = 5000
QUIET_SECONDS = 0.05


class Terminal:
    """One command in it: `command(stdin=..., stdout=..., stderr=..., before=...)` starts it."""

    def __init__(self, command: Callable[..., "subprocess.Popen[str]"], columns: int, lines: int) -> None:
        self._lock = threading.Condition()
        self._fed_at = 0.0
        self._screen = pyte.HistoryScreen(columns, lines, history=SCROLLBACK, ratio=0.01)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = os.openpty()
        self._set_size(columns, lines)
        self.process = command(stdin=slave, stdout=slave, stderr=slave, before=AS_LEADER)
        os.close(slave)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def resize(self, columns: int, lines: int) -> None:
        """As a terminal that wraps lines which no longer fit does: most do. Between two pictures, not within one."""
        until(lambda: time.monotonic() - self._fed_at > QUIET_SECONDS)
        with self._lock:
            rows = [row.rstrip() for row in self._screen.display[: self._screen.cursor.y + 1]]
            above, hidden = list(self._screen.history.top), "" if self.cursor_is_shown else "\x1b[?25l"
            self._screen.resize(lines, columns)
            self._screen.reset()
            self._screen.history.top.extend(above)
            wrapped = [row[at : at + columns] for row in rows for at in range(0, max(1, len(row)), columns)]
            self._stream.feed(("\r\n".join(wrapped) + hidden).encode())
            self._set_size(columns, lines)
        os.kill(self.process.pid, signal.SIGWINCH)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def cursor_is_shown(self) -> bool:
        return not self._screen.cursor.hidden

    def rows(self) -> list[str]:
        """All that it shows, and what has scrolled away."""
        with self._lock:
            width = self._screen.columns
            above = ["".join(row[column].data for column in range(width)) for row in self._screen.history.top]
            return [row.rstrip() for row in [*above, *self._screen.display]]

    def shows(self, text: str) -> None:
        """Wait until a row has this text."""
        self.until(lambda: any(text in row for row in self.rows()))

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition of what it shows; looked at whenever that changes."""
        with self._lock:
            assert self._lock.wait_for(condition, START_SECONDS), "\n".join(self.rows())

    def end(self, timeout_seconds: float) -> int:
        """Wait for the end of the command; its exit code."""
        exit_code = self.process.wait(timeout_seconds)
        self._reader.join(timeout_seconds)
        os.close(self._master)
        return exit_code

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # Linux' way to say that no process has the other side any more
            while data := os.read(self._master, 65536):
                with self._lock:
                    self._stream.feed(data)
                    self._fed_at = time.monotonic()
                    self._lock.notify_all()

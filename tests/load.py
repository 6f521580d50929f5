"""Busy processes that run during the tests: a load that every test must bear."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"
"""Never done, and ended by the end of its parent, however that comes about."""


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Run this many processes, each of which takes as much of a core as it gets."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        running += (
            subprocess.Popen([sys.executable, "-S", "-c", BUSY, str(os.getpid())], stderr=subprocess.DEVNULL)
            for _ in range(count)
        )
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()

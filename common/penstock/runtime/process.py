"""Processes: started tied to their parent, recognised by pid and start time, ended with all their children.

Invariant: no process is signalled by its pid alone. The kernel reuses pids, so pid and start time together identify a
process, and both are compared before each signal.
"""

import os
import platform
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from penstock.runtime import lifeline
from penstock.runtime.lifeline import die_with_parent

__all__ = [
    "ProcessIdentity",
    "descendants",
    "die_with_parent",
    "heeded",
    "kill_all",
    "parent_pid",
    "signal_all",
    "this_machine",
    "tied_command",
    "wait_until_gone",
]

_STATE_FIELD = 0  # of /proc/<pid>/stat after the command's name; field 3 of proc(5)
_START_FIELD = 19  # likewise; field 22 of proc(5): clock ticks after boot
_GONE_STATES = ("Z", "X")  # a zombie runs nothing: it only waits for its parent to read its exit code
KILL_SECONDS = 10.0  # the kernel needs time to reclaim many gigabytes
_POLL_SECONDS = 0.02  # the end of a process that is not a child raises no signal


def heeded(*signals: signal.Signals) -> list[signal.Signals]:
    """Those that this process was not told to ignore: `nohup` does so with SIGHUP, a script's `&` with SIGINT."""
    return [each for each in signals if signal.getsignal(each) is not signal.SIG_IGN]


def tied_command(command: Sequence[str], signal_number: int = signal.SIGKILL) -> list[str]:
    """`command` with a prefix that ties it to this process: start it as a direct child, and it ends with its parent.

    Start it from the main thread. Its pid is that of the started process, its exit code the command's own, or 127
    if the command cannot be started.
    """
    script = str(Path(lifeline.__file__).resolve())
    return [sys.executable, "-I", "-S", script, str(os.getpid()), str(int(signal_number)), *command]


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, also after its end: `started` differs between any two processes with the same pid."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """The process that has `pid` now; None if there is none (a zombie counts as none)."""
        started = _started(pid)
        return None if started is None else cls(pid, started)

    @property
    def alive(self) -> bool:
        return _started(self.pid) == self.started

    def send(self, signal_number: int) -> bool:
        """Signal it; False if it is gone."""
        if not self.alive:
            return False
        try:
            os.kill(self.pid, signal_number)
        except ProcessLookupError:
            return False
        return True


def this_machine() -> str:
    """Host name, and the id of its boot if there is one."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    boot = boot_id.read_text(encoding="ascii").strip() if boot_id.exists() else ""
    return f"{platform.node()} {boot}".strip()


def parent_pid(pid: int) -> int | None:
    """The parent of a process; None if the process is gone."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return None


def descendants(pid: int) -> list[ProcessIdentity]:
    """The children of a process, their children and so on; empty if the process is gone."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [identity for child in children if (identity := ProcessIdentity.of(child.pid)) is not None]


def signal_all(processes: Iterable[ProcessIdentity], signal_number: int) -> int:
    """Signal the processes that live; returns their number."""
    return sum(process.send(signal_number) for process in processes)


def kill_all(processes: Iterable[ProcessIdentity], grace_seconds: float) -> int:
    """End processes and all their descendants: SIGTERM, then SIGKILL after `grace_seconds`; their number. Blocks.

    Their parents can still read the exit codes.
    """
    targets = _with_descendants({process for process in processes if process.alive})
    signal_all(targets, signal.SIGTERM)
    left = wait_until_gone(targets, grace_seconds)
    if left:
        left = _with_descendants(left)
        signal_all(left, signal.SIGKILL)
        wait_until_gone(left, KILL_SECONDS)
    return len(targets)


def _with_descendants(processes: set[ProcessIdentity]) -> set[ProcessIdentity]:
    return processes.union(*(descendants(process.pid) for process in processes))


def wait_until_gone(processes: set[ProcessIdentity], timeout_seconds: float) -> set[ProcessIdentity]:
    """The processes that still live after the timeout. Blocks."""
    deadline = time.monotonic() + timeout_seconds
    left = {process for process in processes if process.alive}
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        left = {process for process in left if process.alive}
    return left


def _started(pid: int) -> str | None:
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return _started_elsewhere(pid)
    try:
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[_STATE_FIELD] in _GONE_STATES else f"ticks:{fields[_START_FIELD]}"


def _started_elsewhere(pid: int) -> str | None:
    """The start time without /proc."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"time:{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None

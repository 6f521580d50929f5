"""What a SGLang that is killed leaves in shared memory: the file of its load and its semaphores, some kilobytes each.

Only SGLang itself would delete them, at an orderly end, which takes it longer than anyone waits. Invariant: nothing is
deleted but files of these names that the server's own processes had mapped; the trainer's weights are not among them.
"""

from collections.abc import Iterable
from pathlib import Path

from penstock.runtime.process import ProcessIdentity, descendants, kill_all

SHARED_MEMORY = Path("/dev/shm")
OWN_NAMES = ("sglang_loads_", "sem.mp-")
INODE = 4  # the field of /proc/PID/maps


def kill_and_clear(server: ProcessIdentity, grace_seconds: float) -> None:
    """End a server with all its descendants, and delete what it leaves. Blocks."""
    left = files_of(server.pid)
    kill_all([server], grace_seconds)
    for path in left:
        path.unlink(missing_ok=True)


def files_of(pid: int) -> list[Path]:
    """The files of SGLang's own that a server has mapped; none if it is gone."""
    server = ProcessIdentity.of(pid)
    return [] if server is None else own_files([server, *descendants(pid)])


def own_files(processes: Iterable[ProcessIdentity]) -> list[Path]:
    """The files of SGLang's own that the processes have mapped; none if the kernel does not show them.

    By their inodes: a semaphore is mapped under another name than it has later.
    """
    inodes = {inode for process in processes for inode in _mapped(process.pid)}
    files = [path for name in OWN_NAMES for path in SHARED_MEMORY.glob(f"{name}*")]
    return [path for path in files if _inode(path) in inodes]


def _mapped(pid: int) -> set[int]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {int(line.split()[INODE]) for line in lines if f" {SHARED_MEMORY}/" in line}


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:  # somebody else's, and gone by now
        return 0

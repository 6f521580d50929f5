"""A folder on this host that one process owns while it lives, in memory if there is room.

Owns the claim: a lock on a file inside, which the kernel releases with the process. Invariant: no two processes hold
one folder. If a process was killed, the next one claims its folder, so that there are never more folders than processes
ran at once.
"""

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import tempfile
from pathlib import Path

import xxhash

from penstock.errors import ConfigError

SHARED_MEMORY = Path("/dev/shm")
MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "hugetlbfs"}
LOCK_NAME = ".lock"


def is_memory_backed(folder: Path) -> bool:
    """Whether the folder's file system lives in memory (Linux; elsewhere False)."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return False
    resolved = folder.resolve()
    fields = [line.split(" ") for line in mounts.read_text().splitlines()]
    points = {Path(each[1].replace("\\040", " ")): each[2] for each in fields}
    nearest = next((path for path in (resolved, *resolved.parents) if path in points), None)
    return nearest is not None and points[nearest] in MEMORY_FILE_SYSTEMS


def shared_memory(needed_bytes: int) -> Path | None:
    """The host's memory-backed folder, if there is one with room."""
    usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK) and is_memory_backed(SHARED_MEMORY)
    return SHARED_MEMORY if usable and shutil.disk_usage(SHARED_MEMORY).free > needed_bytes else None


def name_of_run(run_name: str, run_folder: Path) -> str:
    """A name for the run's folders outside its own: two runs with one name but different folders must not share any."""
    return f"penstock-{run_name}-{xxhash.xxh3_64_hexdigest(str(run_folder.resolve()).encode())[:8]}"


def free_memory_of_run(run_name: str, run_folder: Path) -> None:
    """Remove what the services of a run have left in the host's memory. Call it when none of them runs here."""
    name = re.escape(name_of_run(run_name, run_folder))
    left = re.compile(rf"{name}(-(trainer|rollout)-\d+)?")
    if SHARED_MEMORY.is_dir():
        for path in SHARED_MEMORY.iterdir():
            if left.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)


class LocalFolder:
    """A claimed folder, until `release`."""

    def __init__(self, name: str, needed_bytes: int, root: str = "") -> None:
        """Claim `<root>/<name>-<n>` with the lowest free n. `root`: empty for memory, else a temporary folder."""
        place = Path(root) if root else shared_memory(needed_bytes) or Path(tempfile.gettempdir())
        try:
            self.path, self._lock = next(filter(None, (_claim(place / f"{name}-{n}") for n in itertools.count())))
        except OSError as error:
            raise ConfigError(
                f"weights.local_folder: no folder can be made in {place} ({error.strerror}): expected a local one that "
                "can be written to, on a file system with locks (flock)"
            ) from error

    def release(self) -> None:
        """Remove the folder and its lock."""
        shutil.rmtree(self.path)
        os.close(self._lock)


def _claim(folder: Path) -> tuple[Path, int] | None:
    """The folder with its lock, or None if another process holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.stat(folder / LOCK_NAME).st_ino == os.fstat(lock).st_ino:
                return folder, lock
        os.close(lock)  # its holder removed the folder between the two calls

"""Files that survive a power cut: complete or absent.

Owns writing under a temporary name, flushing and renaming.
"""

import contextlib
import errno
import os
from pathlib import Path

from penstock.errors import PenstockError


def write_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write under a temporary name, flush to the disk, rename: a reader sees the complete new file or the old state.

    `mode`: permissions of the file, less the process's umask.
    PenstockError, and no temporary file left, if there is no room or no right to write.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        room = "room and the right to write below run.root: free some, or move the run's folder and set run.root"
        raise PenstockError(
            f"{path} ({len(data)} bytes) cannot be written ({error.strerror}); {missing(error, room)}"
        ) from error


def missing(error: OSError, room: str) -> str:
    """What was expected of a file that could not be written: `room`, unless the process may open no more files."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "expected fewer open files: raise the limit of this process or host (ulimit -n), or end what holds them"
    return f"expected {room}"


def sync_folder(folder: Path) -> None:
    """Flush a folder, so that a rename inside it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

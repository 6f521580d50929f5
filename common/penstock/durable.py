"""Files that are complete or absent, and those of them that survive a power cut.

Owns writing under a temporary name, flushing and renaming, and the words for a disk that cannot be written.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from penstock.errors import PenstockError

DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # only writing raises them, and a defect does not
RUN_FOLDER_KEY = "run.root, after a move of the run's folder"


@contextlib.contextmanager
def writing(what: str, key: str = RUN_FOLDER_KEY) -> Iterator[None]:
    """Turn an OSError into a PenstockError that names `what` (a path) and the key to change."""
    try:
        yield
    except OSError as error:
        raise unwritable(what, error, key) from error


def unwritable(what: str, error: OSError, key: str = RUN_FOLDER_KEY) -> PenstockError:
    """The error for something that cannot be written."""
    room = f"room there and the right to write: make room, or set another {key}"
    return PenstockError(f"{what} cannot be written ({error.strerror}); {missing(error, room)}")


def write_durably(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write under a temporary name, flush to the disk, rename: a reader sees the complete new file or the old state.

    `mode`: permissions of the file, less the process's umask.
    PenstockError, and no temporary file left, if there is no room or no right to write.
    """
    _write(path, data, mode, flush=True)


def write_complete(path: Path, data: bytes) -> None:
    """As `write_durably`, but not flushed: a power cut may lose the new file or empty it."""
    _write(path, data, 0o666, flush=False)


def _write(path: Path, data: bytes, mode: int, *, flush: bool) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(f"{path} ({len(data)} bytes)"), _removed(temporary):
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if flush:
            sync_folder(path.parent)


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


@contextlib.contextmanager
def _removed(temporary: Path) -> Iterator[None]:
    """Leave no temporary file behind an error."""
    try:
        yield
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise

"""The folder of a run as the owner of its state: an id in a file inside, which moves with the folder.

Owns that file. Invariant: two folders have different ids, whatever their paths and hosts are called; of two processes
that make the id of a folder at the same moment, both read the same one.
"""

import os
import secrets
import socket
from pathlib import Path

from penstock.durable import write_durably, writing

ID_FILE = "folder_id"
STATE = ("steps", "checkpoints")  # folders that only a run that has begun has


class RunHome:
    """The folder of a run, and how others call the process that works in it."""

    def __init__(self, path: Path, process: str) -> None:
        """`process`: its kind, such as trainer, for the messages of others."""
        self.path = path
        self.words = f"the {process} on {socket.gethostname()} (pid {os.getpid()}), folder {path.resolve()}"

    def id(self) -> str:
        """The folder's id, made if the folder is new. Empty: it holds an earlier run and no id, as a backup may."""
        if known := self._read():
            return known
        if any((self.path / name).is_dir() for name in STATE):
            return ""
        unique = self.path / f"{ID_FILE}.{secrets.token_hex(4)}"
        self._write(unique, new_id())
        with writing(str(self.path / ID_FILE)):
            try:
                os.link(unique, self.path / ID_FILE)  # fails if another was first; a rename would replace its id
            except FileExistsError:
                pass
            finally:
                unique.unlink()
        return self._read()

    def keep(self, folder_id: str) -> None:
        """Write the id that the run has from now on."""
        if self._read() != folder_id:
            self._write(self.path / ID_FILE, folder_id)

    def _write(self, file: Path, folder_id: str) -> None:
        with writing(str(self.path)):
            self.path.mkdir(parents=True, exist_ok=True)
        write_durably(file, f"{folder_id}\n".encode())

    def _read(self) -> str:
        try:
            return (self.path / ID_FILE).read_text(encoding="ascii").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""


def new_id() -> str:
    """An id that no folder has."""
    return secrets.token_hex(8)

"""The folder of a run as the owner of its state: an id and the last lease, in files inside that move with the folder.

Owns these files. Invariant: two folders have different ids, whatever their paths and hosts are called; of two processes
that make the id of a folder at the same moment, both read the same one.
"""

import os
import secrets
import socket
from pathlib import Path

from penstock.durable import write_durably, writing

ID_FILE = "folder_id"
LEASE_FILE = "lease"
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

    def last_lease(self) -> int:
        """The number of the last lease that a trainer of this folder has held; 0 if none has."""
        number = self._read(LEASE_FILE)
        return int(number) if number.isdecimal() else 0

    def keep_lease(self, number: int) -> None:
        """Write the number of the lease that is held now. Weights that carry it may be sent only after this."""
        if number > self.last_lease():  # a trainer that was frozen meanwhile has lost its lease to a later one
            self._write(self.path / LEASE_FILE, str(number))

    def _write(self, file: Path, text: str) -> None:
        with writing(str(self.path)):
            self.path.mkdir(parents=True, exist_ok=True)
        write_durably(file, f"{text}\n".encode())

    def _read(self, name: str = ID_FILE) -> str:
        try:
            return (self.path / name).read_text(encoding="ascii").strip()
        except (FileNotFoundError, NotADirectoryError):
            return ""


def new_id() -> str:
    """An id that no folder has."""
    return secrets.token_hex(8)

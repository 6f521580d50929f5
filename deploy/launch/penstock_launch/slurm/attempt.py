"""One life of a service on the nodes that it runs on: the files by which the launcher and these nodes meet.

    <run folder>/slurm/<attempt>.json    node, host and process id of the service
                       <attempt>.port    the port on the first of several nodes where the trainer's ranks meet
                       <attempt>.exit    the exit code of the rank that is to blame for the end of all

Invariant: each file appears whole, and its name is never used again: a file system that shows an old state for a while
shows that it is not there yet.
"""

import os
import re
import time
from pathlib import Path

import msgspec

from penstock.durable import write_durably
from penstock.errors import ConfigError

FOLDER = "slurm"
SUFFIXES = ("json", "port", "exit")
FILE = re.compile(rf".+-[0-9a-f]{{8}}\.({'|'.join(SUFFIXES)})")  # <service>-<attempt>.<suffix>
POLL_SECONDS = 0.2  # another host's file announces itself to nobody


class Whereabouts(msgspec.Struct, frozen=True):
    """Where a service runs. `host` is what it calls its host itself, `node` what Slurm does."""

    node: str
    host: str
    pid: int


class Attempt:
    """Paths and contents of the files of one life."""

    def __init__(self, folder: Path, name: str) -> None:
        """`folder`: that of the run."""
        self.name = name
        self._folder = folder / FOLDER
        self.exit_path = self._path("exit")

    def tell_whereabouts(self, whereabouts: Whereabouts) -> None:
        write_durably(self._path("json"), msgspec.json.encode(whereabouts))

    def whereabouts(self) -> Whereabouts | None:
        """None until the service has been started."""
        try:
            return msgspec.json.decode(self._path("json").read_bytes(), type=Whereabouts)
        except FileNotFoundError:
            return None

    def tell_port(self, port: int) -> None:
        write_durably(self._path("port"), str(port).encode())

    def wait_for_port(self, timeout_seconds: float) -> int:
        """The port that another node has told. Blocks."""
        path, deadline = self._path("port"), time.monotonic() + timeout_seconds
        while True:
            os.listdir(self._folder)  # makes a network file system look again
            try:
                return int(path.read_text("ascii"))
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"run.root: {path} of the trainer's first node has not appeared here within "
                        f"{timeout_seconds:g} s; expected a file system that all nodes share"
                    ) from None
            time.sleep(POLL_SECONDS)

    def blamed_exit_code(self) -> int | None:
        """None where no rank was to blame."""
        try:
            return int(self.exit_path.read_text("ascii"))
        except (FileNotFoundError, ValueError):
            return None

    def forget(self) -> None:
        """Remove its files."""
        for suffix in SUFFIXES:
            self._path(suffix).unlink(missing_ok=True)

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self.name}.{suffix}"


def forget_attempts(folder: Path) -> None:
    """Make the folder for them, and remove what lives that were cut off have left there."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for path in (folder / FOLDER).iterdir():
        if FILE.fullmatch(path.name):
            path.unlink()

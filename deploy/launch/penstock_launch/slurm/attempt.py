"""One attempt to run a service: the files through which the launcher and the service's nodes exchange facts.

    <run folder>/slurm/<attempt>.json    node, host and process id of the service
                       <attempt>.port    the port on the first of several nodes where the trainer's ranks meet
                       <attempt>.exit    the exit code of the rank that caused the end of all ranks

Invariant: a file appears with its full content, and no name is used twice. So a network file system that still shows an
old state can only hide a file, never show an outdated one.
"""

import os
import time
from pathlib import Path

import msgspec

from penstock.durable import write_durably
from penstock.errors import ConfigError

FOLDER = "slurm"
SUFFIXES = ("json", "port", "exit")
POLL_SECONDS = 0.2  # a file that another host writes raises no event


class Whereabouts(msgspec.Struct, frozen=True):
    """Where a service runs. `node`: the host's name in Slurm; `host`: the host's own name."""

    node: str
    host: str
    pid: int


class Attempt:
    """Paths and contents of the files of one attempt."""

    def __init__(self, folder: Path, name: str) -> None:
        """`folder`: the run's folder."""
        self.name = name
        self._folder = folder / FOLDER
        self.exit_path = self._path("exit")

    def write_whereabouts(self, whereabouts: Whereabouts) -> None:
        write_durably(self._path("json"), msgspec.json.encode(whereabouts))

    def whereabouts(self) -> Whereabouts | None:
        """Where the service runs; None until it has been started."""
        try:
            return msgspec.json.decode(self._path("json").read_bytes(), type=Whereabouts)
        except FileNotFoundError:
            return None

    def write_port(self, port: int) -> None:
        write_durably(self._path("port"), str(port).encode())

    def wait_for_port(self, timeout_seconds: float) -> int:
        """The port that the first node has written. Blocks; ConfigError if it does not appear in time."""
        path, deadline = self._path("port"), time.monotonic() + timeout_seconds
        while True:
            os.listdir(self._folder)  # makes a network file system read the folder anew
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
        """The exit code of the rank that caused the end; None if no rank did."""
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
    """Make the folder of the attempts, and delete files that earlier lives of the job left there."""
    (folder / FOLDER).mkdir(exist_ok=True)
    for suffix in SUFFIXES:
        for path in (folder / FOLDER).glob(f"*.{suffix}"):
            path.unlink()

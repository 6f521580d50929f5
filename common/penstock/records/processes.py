"""`processes.json` in the folder of a run: the processes of a launch that has not ended in order, launcher included.

Owns the file's format. The next launch finds in it the processes that this one could not end, and others find the
launcher. Invariant: a pid of another host, boot or run means nothing here.
"""

import platform
from pathlib import Path

import msgspec

from penstock.records.files import PROCESSES_FILE
from penstock.runtime.process import ProcessIdentity, this_machine

LAUNCHER = "launcher"


class KnownProcess(msgspec.Struct, frozen=True):
    """One process of a launch. `service` is the child that it belongs to."""

    service: str
    pid: int
    started: str

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.started)


class KnownProcesses(msgspec.Struct, frozen=True):
    """The content of the file. `machine` names the host and its boot: the pids are only valid there."""

    run: str
    machine: str
    processes: tuple[KnownProcess, ...]

    @property
    def of_this_host(self) -> bool:
        """Whether they ran here, if before the last boot too."""
        return self.machine.partition(" ")[0] == platform.node()

    def here(self, run: str) -> tuple[KnownProcess, ...]:
        """Those whose pids mean something: of this run, host and boot."""
        return self.processes if self.run == run and self.machine == this_machine() else ()

    def live_launcher(self, run: str) -> ProcessIdentity | None:
        """The launcher of the run on this host; None if it does not live."""
        identities = (each.identity for each in self.here(run) if each.service == LAUNCHER)
        return next((identity for identity in identities if identity.alive), None)


def read_record(folder: Path) -> KnownProcesses | None:
    """The record as it is; None if there is none that can be read."""
    try:
        return msgspec.json.decode((folder / PROCESSES_FILE).read_bytes(), type=KnownProcesses)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def read_known(folder: Path, run: str) -> list[KnownProcess]:
    """The processes that the last launch of this run, on this machine, has recorded."""
    known = read_record(folder)
    return list(known.here(run)) if known else []

"""What became of a run, by the files of its folder: it runs, or how its last launch ended.

processes.json    its launcher lives                               running
                  its launcher is gone, here                       crashed
                  of another host, or of a folder that was copied  unknown
none, summary.json of the last launch      exit code 0             finished
                                           128 + a signal          stopped
                                           any other               failed
neither, trainer_summary.json (services without a launcher)        finished
none of them                                                       unknown
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from penstock.records.files import SUMMARY_FILE, TRAINER_SUMMARY_FILE
from penstock.records.processes import LAUNCHER, KnownProcesses, read_record
from penstock.runtime.process import ProcessIdentity

StateName = Literal["running", "finished", "stopped", "failed", "crashed", "unknown"]
FIRST_CODE_OF_A_SIGNAL = 128  # stopped by Ctrl-C is 130


@dataclass(frozen=True)
class RunState:
    """The state of a run, with its reason in words.

    exit_code: of the launch that ended. lines: the last words of the service that ended it. launcher: if it runs here.
    """

    name: StateName
    reason: str
    exit_code: int | None = None
    lines: tuple[str, ...] = ()
    launcher: ProcessIdentity | None = None

    def __str__(self) -> str:
        return self.reason if self.reason.startswith(f"{self.name} ") else f"{self.name}: {self.reason}"


class End(msgspec.Struct, frozen=True):
    """How a launch ended."""

    code: int
    reason: str = ""
    lines: tuple[str, ...] = ()

    @property
    def state(self) -> RunState:
        name: StateName = "failed"
        if self.code == 0:
            name = "finished"
        elif self.code > FIRST_CODE_OF_A_SIGNAL:
            name = "stopped"
        return RunState(name, self.reason, self.code, self.lines)


class _Summary(msgspec.Struct, frozen=True):
    exit: End


def read_end(folder: Path) -> End | None:
    """How the last launch that ended in order did so; None if none has."""
    try:
        return msgspec.json.decode((folder / SUMMARY_FILE).read_bytes(), type=_Summary).exit
    except (OSError, msgspec.DecodeError):
        return None


def read_state(folder: Path) -> RunState:
    """The state of the run in this folder."""
    while (record := read_record(folder)) is not None:
        state = _state_of(record, folder.name)
        if state.name != "crashed" or read_record(folder) == record:  # else it ended in order while this looked
            return state
    if end := read_end(folder):
        return end.state
    if (folder / TRAINER_SUMMARY_FILE).exists():
        return RunState("finished", "the trainer has finished")
    return RunState("unknown", "no launcher has recorded its start or its end")


def _state_of(record: KnownProcesses, run: str) -> RunState:
    if launcher := record.live_launcher(run):
        return RunState("running", f"its launcher has pid {launcher.pid}", launcher=launcher)
    if record.run != run:
        return RunState("unknown", f"the folder is a copy, made while run {record.run!r} ran")
    if record.of_this_host:
        pids = [str(each.pid) for each in record.processes if each.service == LAUNCHER]
        return RunState("crashed", f"its launcher (pid {', '.join(pids)}) is gone, and wrote no end")
    return RunState("unknown", f"it was launched on {record.machine.partition(' ')[0]}, which has recorded no end")

"""The launcher that Python has started: a process in a session of its own, with its output in a file.

Invariant: it depends on nothing of its parent. A notebook's kernel that is interrupted, restarted or killed ends no
run; `penstock.open_run` finds it, and `stop` ends it.
"""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from penstock.records.files import CONFIG_FILE, SUMMARY_FILE
from penstock.records.state import End, RunState, read_end
from penstock.runtime.process import ProcessIdentity

MOST_LINES = 20  # of the launcher's output in an error
OWN_WORDS = "penstock: "  # before what the launcher itself says, and not a service
WARNING = "penstock: warning: "


@dataclass(frozen=True)
class Mark:
    """What a file was at one moment; a file that is written again has another mark."""

    inode: int
    written_at_ns: int

    @classmethod
    def of(cls, path: Path) -> "Mark | None":
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls(status.st_ino, status.st_mtime_ns)


class FolderBefore:
    """What an earlier launch left in a run's folder, so that it is not mistaken for this launch's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config, self._summary = Mark.of(folder / CONFIG_FILE), Mark.of(folder / SUMMARY_FILE)

    @property
    def is_prepared(self) -> bool:
        """Whether the launch has decided what becomes of the earlier run, and deleted what is not continued."""
        return Mark.of(self._folder / CONFIG_FILE) not in (None, self._config)

    def end(self) -> End | None:
        """How this launch has ended; None if it has written no end."""
        return None if Mark.of(self._folder / SUMMARY_FILE) == self._summary else read_end(self._folder)


class StartedLauncher:
    """A launcher that is a child of this process. `output_begins`: how long its file was before."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", before: FolderBefore, output: Path, output_begins: int
    ) -> None:
        self.pid = process.pid
        self._process = process
        self._before = before
        self._output = output
        self._output_begins = output_begins

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_prepared(self) -> bool:
        return self._before.is_prepared

    def output(self) -> str:
        """What it has written so far."""
        with self._output.open("rb") as file:
            file.seek(self._output_begins)
            return file.read().decode(errors="replace")

    def state(self) -> RunState:
        """The state of its launch."""
        exit_code = self._process.poll()
        if exit_code is None:
            identity = ProcessIdentity.of(self.pid)
            return RunState("running", f"its launcher has pid {self.pid}", launcher=identity)
        end = self._before.end()
        if end is not None and end.code == exit_code:
            return end.state
        if exit_code < 0:
            return self._killed(-exit_code)
        return End(exit_code, "its launcher ended before the run", tuple(last_words(self.output()))).state

    def _killed(self, number: int) -> RunState:
        name = Signals(number).name
        if number == Signals.SIGTERM:  # before it could end in order: no service had begun
            return RunState("stopped", f"stopped by {name}", 128 + number)
        return RunState("crashed", f"its launcher was killed by {name}", 128 + number)


def last_words(output: str) -> list[str]:
    """The launcher's error, which may have several lines; its last lines if it wrote none."""
    lines = output.rstrip().splitlines()
    own = [number for number, line in enumerate(lines) if line.startswith(OWN_WORDS) and not line.startswith(WARNING)]
    return lines[own[-1] :][-MOST_LINES:] if own else lines[-MOST_LINES:]

"""A run for Python: followed while it runs, ended in order, read as tables.

Owns the waits: each looks again and again whether the launcher lives, and ends with it; none ends because a file is
silent. Invariant: only the launcher is signalled, and only if pid and start time are those of its record.
"""

import contextlib
import os
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.api.frames import frame
from penstock.api.launcher import StartedLauncher
from penstock.errors import PenstockError
from penstock.records import DEFAULT_ROOT, RunRecords, RunState, find_run, list_runs
from penstock.records.files import EVALUATIONS_FILE, STEPS_FILE
from penstock.records.lines import Tail
from penstock.runtime.output import complain
from penstock.runtime.process import wait_until_gone

if TYPE_CHECKING:
    from types import TracebackType

    from pandas import DataFrame

Line = dict[str, Any]
OnLine = Callable[[Line], object]

POLL_SECONDS = 0.5  # a step takes longer
STOP_SECONDS = 180.0  # the launcher gives the trainer 120 s for its checkpoint, the others 35 s


class RunFailedError(PenstockError):
    """A run that has failed or crashed; the message ends with the last words of what failed. `state`: how it ended."""

    kind = "run_failed"

    def __init__(self, name: str, state: RunState) -> None:
        code = "" if state.exit_code is None else f" with exit code {state.exit_code}"
        super().__init__("\n".join([f"run {name!r} has {state.name}{code}: {state.reason}", *state.lines]))
        self.state = state


class Run:
    """One run, on this host or in a folder. `penstock.launch` and `penstock.open_run` make it."""

    def __init__(self, records: RunRecords, launcher: StartedLauncher | None = None) -> None:
        """`launcher`: of this process; None: whatever launcher the records name."""
        self.name = records.name
        self.folder = records.folder
        self._records = records
        self._launcher = launcher
        if launcher is not None:
            weakref.finalize(self, _mention_live_run, launcher, records.folder)

    def __repr__(self) -> str:
        return f"<penstock.Run {self.name!r}: {self.state()}; in {self.folder}>"

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: "TracebackType | None"
    ) -> None:
        self.stop()

    def state(self) -> RunState:
        """Whether it runs, or how it ended: running, finished, stopped, failed, crashed or unknown."""
        recorded = self._records.state()
        return recorded if self._launcher is None or recorded.name == "running" else self._launcher.state()

    def follow(self) -> Iterator[Line]:
        """Each line of `steps.jsonl`, those that are there first, then each when its step ends, until the run ends.

        RunFailedError at the end of a run that has failed. A run that does not run here ends with its last line.
        """
        for _, line in self._new_lines(STEPS_FILE):
            yield line
        self._require_no_failure()

    def wait(
        self,
        timeout_seconds: float | None = None,
        *,
        on_step: OnLine | None = None,
        on_evaluation: OnLine | None = None,
    ) -> RunState:
        """Wait for its end, and return how it ended; RunFailedError if it has failed, TimeoutError if it runs on.

        on_step, on_evaluation: called with each line, from the first of the run on. What they raise ends the wait, and
        not the run.
        """
        wanted = {STEPS_FILE: on_step, EVALUATIONS_FILE: on_evaluation}
        calls = {file: call for file, call in wanted.items() if call is not None}
        for file, line in self._new_lines(*calls, timeout_seconds=timeout_seconds):
            calls[file](line)
        return self._require_no_failure()

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> RunState:
        """End it in order, as `penstock cancel` does: the trainer writes its checkpoint. Returns how it ended.

        A run that has ended stays as it is. TimeoutError if it has not ended in time; a second call then kills
        everything that is left of it.
        """
        state = self.state()
        if state.name == "unknown":
            raise PenstockError(
                f"run {self.name!r} cannot be stopped from here: {state.reason}; expected `penstock cancel` on the "
                "host that launched it"
            )
        if state.name != "running":
            return state
        launcher = state.launcher
        if launcher is not None and launcher.send(signal.SIGTERM) and wait_until_gone({launcher}, timeout_seconds):
            raise self._runs_on(timeout_seconds)
        return self.state()

    def steps(self) -> "DataFrame":
        """A row for each step; columns as curves in trackers: `reward_mean`, `statistics/loss`, `seconds/step`."""
        return frame(self._records.steps())

    def evaluations(self) -> "DataFrame":
        """A row for each evaluation on held-out prompts: `steps` trained before it, `accuracy`, `reward_mean`."""
        return frame(self._records.evaluations())

    def completions(self) -> "DataFrame":
        """A row for each completion that the run kept for people to read."""
        return frame(self._records.completions())

    def config(self) -> dict[str, Any]:
        """The configuration as it was resolved, without secrets."""
        return self._records.config()

    def summary(self) -> dict[str, Any]:
        """The figures of the last launch that ended in order; empty before."""
        return self._records.summary()

    def output(self) -> str:
        """What the launcher of this process has written; empty for a run that was opened: see `logs/launcher.log`."""
        return "" if self._launcher is None else self._launcher.output()

    def _require_no_failure(self) -> RunState:
        state = self.state()
        if state.name in ("failed", "crashed"):
            raise RunFailedError(self.name, state)
        return state

    def _new_lines(self, *files: str, timeout_seconds: float | None = None) -> Iterator[tuple[str, Line]]:
        """Each file and line of it, until the run has ended; TimeoutError if it runs on."""
        begun = time.monotonic()
        with contextlib.ExitStack() as stack:
            tails = {file: stack.enter_context(contextlib.closing(Tail(self.folder / file))) for file in files}
            while True:
                runs = self.state().name == "running"  # before the files: what is written until its end is read
                if self._launcher is None or self._launcher.is_prepared:
                    for file, tail in tails.items():
                        for line in tail.new():
                            yield file, line
                if not runs:
                    return
                if timeout_seconds is not None and time.monotonic() - begun >= timeout_seconds:
                    raise self._runs_on(timeout_seconds)
                time.sleep(POLL_SECONDS)

    def _runs_on(self, timeout_seconds: float) -> TimeoutError:
        return TimeoutError(
            f"run {self.name!r} has not ended within {timeout_seconds:g} s; its logs are in {self.folder / 'logs'}"
        )


def open_run(name_or_folder: str | os.PathLike[str], root: str | os.PathLike[str] = DEFAULT_ROOT) -> Run:
    """The run of this name in `root`, or in this folder, whoever launched it; ConfigError if there is none."""
    return Run(find_run(name_or_folder, root))


def runs(root: str | os.PathLike[str] = DEFAULT_ROOT) -> list[Run]:
    """The runs in a folder of runs, by name."""
    return [Run(records) for records in list_runs(root)]


def _mention_live_run(launcher: StartedLauncher, folder: Path) -> None:
    """Nobody may wonder later what holds the GPUs: this process ends, or forgets a run that goes on."""
    if launcher.alive:
        complain(
            f"penstock: {folder.name} goes on (its launcher has pid {launcher.pid}); "
            f"penstock.open_run({str(folder)!r}).stop() ends it"
        )

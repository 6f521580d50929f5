"""What a run has written: the one reader of its folder, for a run that runs, has ended, crashed or was copied.

    records = find_run("demo")                # runs/demo, or the path of any folder of a run
    records.state().name                      # "running"
    for line in records.steps_after(30): line["reward_mean"]

Lines are as they were written (docs/protocol.md), so that those of earlier and later releases are read too.
Invariant: a reader changes nothing, and never fails on what a live writer has not finished.
"""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

from penstock.contracts.ledger import Record
from penstock.errors import ConfigError, DataError
from penstock.records.extent import Extent
from penstock.records.figures import run_figures
from penstock.records.files import (
    COMPLETIONS_FILE,
    CONFIG_FILE,
    DROPPED_FILE,
    EVALUATIONS_FILE,
    FINAL_MODEL,
    MARKS_OF_A_RUN,
    STEP_FILES,
    STEPS_FILE,
    SUMMARY_FILE,
    TRAINED_FILE,
    TRAINER_SUMMARY_FILE,
    read_document,
)
from penstock.records.ledger_files import all_records
from penstock.records.lines import as_written, complete_lines, decoded
from penstock.records.logs import LogFile
from penstock.records.processes import LAUNCHER
from penstock.records.state import RunState, read_state

DEFAULT_ROOT = "runs"  # of the key run.root
MOST_NAMED = 20  # an error is to be read


class _StepNumber(msgspec.Struct, frozen=True):
    step: int


class RunRecords:
    """The records of one run. Each call reads the files as they are now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.name = self.folder.name

    def config(self) -> dict[str, Any]:
        """The resolved configuration, without secrets; empty if no launch has written it. DataError if it is broken."""
        try:
            document = yaml.safe_load((self.folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.folder / CONFIG_FILE} cannot be read ({reason}): expected YAML") from None
        return document if isinstance(document, dict) else {}

    def steps(self) -> Iterator[dict[str, Any]]:
        """A line for each step that was trained, in their order."""
        return map(as_written, complete_lines(self.folder / STEPS_FILE))

    def steps_after(self, step: int) -> Iterator[dict[str, Any]]:
        """The lines of later steps; the others are not decoded in full."""
        lines = complete_lines(self.folder / STEPS_FILE)
        return (as_written(line) for line in lines if decoded(line, _StepNumber).step > step)

    def evaluations(self) -> Iterator[dict[str, Any]]:
        """A line for each evaluation, in the order in which they ended."""
        return map(as_written, complete_lines(self.folder / EVALUATIONS_FILE))

    def completions(self) -> Iterator[dict[str, Any]]:
        """A line for each completion that the run kept for people to read."""
        return map(as_written, complete_lines(self.folder / COMPLETIONS_FILE))

    def dropped(self) -> Iterator[dict[str, Any]]:
        """A line for each completion without a reward that the run kept of dropped groups: the last ones."""
        return map(as_written, complete_lines(self.folder / DROPPED_FILE))

    def ledger(self) -> Iterator[Record]:
        """The ledger's records of steps, weights, dropped tickets and checkpoints, as archive and journal have them."""
        return all_records(self.folder / STEP_FILES)

    def extent(self) -> Extent | None:
        """How far it is; None before its trainer has begun, and of a run without a journal."""
        return Extent.of(self.ledger())

    def figures(self) -> dict[str, Any]:
        """The figures of all its lives until now, by the names of `summary.json`; DataError if a line is broken."""
        try:
            return run_figures(self.steps(), self.evaluations(), self.ledger())
        except (ValueError, KeyError, TypeError, AttributeError, msgspec.MsgspecError, OSError) as error:
            raise DataError(
                f"the files of {self.folder} cannot be read ({type(error).__name__}: {error}): expected lines as the "
                "trainer writes them"
            ) from None

    def summary(self) -> dict[str, Any]:
        """The figures of the last launch that ended in order, or of a trainer without a launcher; empty before."""
        return read_document(self.folder / SUMMARY_FILE) or read_document(self.folder / TRAINER_SUMMARY_FILE)

    def final_steps(self) -> int | None:
        """Of how many steps the model in `final/` is; None if there is none, or an earlier release wrote it."""
        steps = read_document(self.folder / FINAL_MODEL / TRAINED_FILE).get("steps")
        return steps if isinstance(steps, int) else None

    def started_at(self) -> float | None:
        """When its first launch began, by the launcher's log, in Unix seconds.

        A run without a launcher, or without its log, began with its first step; None before that.
        """
        launch = next(LogFile(self.folder, LAUNCHER).new(), None)
        if launch is not None and launch.time:
            return launch.time
        return next((float(line["started_at"]) for line in self.steps()), None)

    def state(self) -> RunState:
        """Whether it runs, or how it ended."""
        return read_state(self.folder)


def list_runs(root: str | os.PathLike[str] = DEFAULT_ROOT) -> list[RunRecords]:
    """The runs in a folder of runs, by name; none if there is no such folder."""
    try:
        folders = sorted(each for each in Path(root).iterdir() if each.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [RunRecords(folder) for folder in folders if _holds_a_run(folder)]


def newest_run(root: str | os.PathLike[str] = DEFAULT_ROOT) -> RunRecords:
    """The run in a folder of runs that has written last, records or logs; ConfigError if there is none."""

    def written_at(run: RunRecords) -> float:
        records = (run.folder / name for name in (*MARKS_OF_A_RUN, COMPLETIONS_FILE))
        paths = (*records, *run.folder.glob("logs/*.log"))
        return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)

    runs = list_runs(root)
    if not runs:
        raise ConfigError(f"there is no run in {root}: expected the name or folder of one, or --root FOLDER")
    return max(runs, key=written_at)


def find_run(name_or_folder: str | os.PathLike[str], root: str | os.PathLike[str] = DEFAULT_ROOT) -> RunRecords:
    """The run of this name in `root`, or in this folder; ConfigError that names what is there instead."""
    given = Path(name_or_folder)
    for folder in (Path(root) / given, given):
        if _holds_a_run(folder):
            return RunRecords(folder)
    there = [run.name for run in list_runs(root)]
    near = difflib.get_close_matches(given.name, there, n=1)
    hint = f"; the nearest is {near[0]!r}" if near else ""
    names = ", ".join(there[:MOST_NAMED]) + (f" and {len(there) - MOST_NAMED} more" if there[MOST_NAMED:] else "")
    raise ConfigError(
        f"saw {str(name_or_folder)!r}, which is no folder of a run and no run in {Path(root).absolute()}; expected "
        + (f"one of {names}{hint}" if there else "the name or folder of a run: there is none in that folder yet")
    )


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in MARKS_OF_A_RUN)

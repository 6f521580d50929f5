"""What can be done after a run has ended: commands for this run, ready to copy.

Invariant: a command is only shown if it works as it stands, in the folder in which the run was launched.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.cells import cell_len

from penstock.config import Config
from penstock.records.extent import Extent
from penstock.records.files import COMPLETIONS_FILE, FINAL_MODEL
from penstock.records.run import RunRecords, list_runs
from penstock.records.state import FIRST_CODE_OF_A_SIGNAL
from penstock_launch.extras import missing
from penstock_launch.typed import PROGRAM, Typed
from penstock_launch.watch.fold import folded_command

INDENT = "    "
IN_PYTHON = "load in Python"
RESUME = ("--run.existing", "resume")


def next_commands(
    config: Config, folder: Path, summary: Mapping[str, Any], typed: Typed | None
) -> list[tuple[str, str]]:
    """Purpose and words of each. typed: what launched the run; None if that is not known."""
    code, extent, early = summary["exit"]["code"], _extent(folder), summary.get("stopped_early") or {}
    return [
        *_look(folder, typed.program if typed else PROGRAM, failed=0 < code < FIRST_CODE_OF_A_SIGNAL),
        *(_longer(config, extent, typed, early) if code == 0 else _again(config, extent, typed)),
        *_model(folder, summary, typed),
    ]


def _look(folder: Path, program: str, *, failed: bool) -> Iterator[tuple[str, str]]:
    if failed:
        yield "what went wrong", f"{program} logs {shlex.quote(str(folder))} --errors"
    if (folder / COMPLETIONS_FILE).exists():
        if not missing(["view"]):
            yield "see in a browser", f"{program} view {shlex.quote(str(folder))}"
        yield "see completions", f"{program} samples {shlex.quote(str(folder))}"
    if (other := _other_run(folder)) is not None:
        yield "compare runs", f"{program} compare {shlex.quote(str(folder))} {shlex.quote(str(other))}"


def _other_run(folder: Path) -> Path | None:
    """The run next to this one that trained last, if any has a step."""
    others = [run.folder for run in list_runs(folder.parent) if run.folder != folder.absolute() and any(run.steps())]
    return folder.parent / max(others, key=lambda each: each.stat().st_mtime).name if others else None


def _extent(folder: Path) -> Extent | None:
    try:
        return RunRecords(folder).extent()
    except (ValueError, msgspec.MsgspecError, OSError):  # the report names it
        return None


def _longer(
    config: Config, extent: Extent | None, typed: Typed | None, early: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The same run with twice what its ledger says is done: an earlier launch may have trained for longer than this.

    One that stopped early has steps left, and needs only the patience for them; one that has solved its task trains
    nothing more.
    """
    if typed is None or extent is None or early.get("solved_tickets"):
        return
    longer = extent.longer(config.total_train_epochs, config.run.max_steps)
    if early:
        longer["eval.patience"] = 0
    if longer:
        more = [word for key, value in longer.items() for word in (f"--{key}", str(value))]
        yield "train longer", typed.launch(*more, *_resume(config))


def _again(config: Config, extent: Extent | None, typed: Typed | None) -> Iterator[tuple[str, str]]:
    """The same launch; if it had trained all of its steps, what it lacks is its end."""
    is_done = extent is not None and extent.is_done(config.total_train_epochs, config.run.max_steps)
    purpose = "finish" if is_done else "go on"
    if typed is not None:
        yield purpose, typed.launch(*_resume(config))
    elif config.run.existing == "resume":
        yield purpose, "the same command"


def _resume(config: Config) -> tuple[str, ...]:
    return () if config.run.existing == "resume" else RESUME


def _model(folder: Path, summary: Mapping[str, Any], typed: Typed | None) -> Iterator[tuple[str, str]]:
    """The newest trained model: as it lies in final/, or in a checkpoint that has a step."""
    newest = max((_steps_of(each) for each in folder.glob("checkpoints/*.*")), default=0)
    final = summary.get("final_steps")
    if final is not None and final >= newest:
        yield IN_PYTHON, f"AutoModelForCausalLM.from_pretrained({str(folder / FINAL_MODEL)!r})  # of transformers"
    elif typed is not None and newest:
        number = next(n for n in range(1, 1000) if not (folder.parent / f"{folder.name}-model-{n}").exists())
        yield "export the model", typed.command("export", "--out", str(folder.parent / f"{folder.name}-model-{number}"))


def _steps_of(checkpoint: Path) -> int:
    """By its name, `<steps>.<lease>`; 0 of a folder that has another one."""
    steps = checkpoint.name.partition(".")[0]
    return int(steps) if steps.isdecimal() else 0


def shown_commands(commands: Sequence[tuple[str, str]], width: int | None) -> Iterator[str]:
    """The lines of the commands, each below its purpose if it does not fit next to it."""
    label = max(len(purpose) for purpose, _ in commands)
    for purpose, words in commands:
        line = f"  {purpose:{label}}  {words}"
        if width is None or cell_len(line) <= width:
            yield line
            continue
        yield f"  {purpose}"
        rows = [words] if purpose == IN_PYTHON else folded_command(words, width - len(INDENT), len(INDENT))
        yield from (f"{INDENT}{row}" for row in rows)

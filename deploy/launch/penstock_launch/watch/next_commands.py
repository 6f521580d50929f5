"""What can be done after a run has ended: commands for this run, ready to copy.

Invariant: a command is only shown if it works as it stands, in the folder in which the run was launched.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from penstock.config import Config
from penstock.records.files import COMPLETIONS_FILE
from penstock.records.run import list_runs
from penstock.records.state import FIRST_CODE_OF_A_SIGNAL
from penstock_launch.extras import missing
from penstock_launch.run_folder import NO_STEPS
from penstock_launch.typed import PROGRAM, Typed

RESUME = ("--run.existing", "resume")


def next_commands(
    config: Config, folder: Path, summary: Mapping[str, Any], typed: Typed | None
) -> list[tuple[str, str]]:
    """Purpose and words of each. typed: what launched the run; None if that is not known."""
    code = summary["exit"]["code"]
    return [
        *_look(folder, typed.program if typed else PROGRAM, failed=0 < code < FIRST_CODE_OF_A_SIGNAL),
        *(_longer(config, summary, typed) if code == 0 else _again(config, typed)),
        *_model(folder, typed),
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


def _longer(config: Config, summary: Mapping[str, Any], typed: Typed | None) -> Iterator[tuple[str, str]]:
    """The same run with twice the limit that ended it; of steps, of epochs, or of both."""
    if typed is None:
        return
    more = []
    if 0 < config.run.max_steps <= summary.get("steps", 0):
        more += ["--run.max_steps", str(2 * config.run.max_steps)]
    if not more or summary.get("epochs", 0.0) >= config.total_train_epochs:
        more += ["--total_train_epochs", str(2 * config.total_train_epochs)]
    yield "train longer", typed.launch(*more, *_resume(config))


def _again(config: Config, typed: Typed | None) -> Iterator[tuple[str, str]]:
    if typed is not None:
        yield "go on", typed.launch(*_resume(config))
    elif config.run.existing == "resume":
        yield "go on", "the same command"


def _resume(config: Config) -> tuple[str, ...]:
    return () if config.run.existing == "resume" else RESUME


def _model(folder: Path, typed: Typed | None) -> Iterator[tuple[str, str]]:
    """The trained model: as it lies in final/, or in a checkpoint that has a step."""
    if (folder / "final" / "config.json").exists():
        yield "load in Python", f"AutoModelForCausalLM.from_pretrained({str(folder / 'final')!r})  # of transformers"
    elif typed is not None and any(not each.name.startswith(NO_STEPS) for each in folder.glob("checkpoints/*.*")):
        number = next(n for n in range(1, 1000) if not (folder.parent / f"{folder.name}-model-{n}").exists())
        yield "export the model", typed.command("export", "--out", str(folder.parent / f"{folder.name}-model-{number}"))

"""`penstock runs`: the runs of a folder in a table.

Invariant: a run whose files cannot be read has a row that says so, and takes nothing from the others.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from penstock.errors import PenstockError
from penstock.records import RunRecords, list_runs
from penstock.records.figures import of_set
from penstock_launch.commands.columns import columns
from penstock_launch.watch.figures import UNKNOWN, duration, heldout_figure, number

HEAD = ("run", "state", "steps", "reward", "accuracy", "held-out reward", "started", "training", "model")
PLACE = HEAD.index("held-out reward")  # of the accuracies of further held-out sets
MODEL_CHARACTERS = 32


def show_runs(root: str) -> list[str]:
    """The lines that `penstock runs` prints, sorted by the start of the run."""
    runs = list_runs(root)
    if not runs:
        return [f"no run in {Path(root).absolute()}"]
    rows = sorted(((_started_at(run), *_row(run)) for run in runs), key=lambda row: row[:2])
    names = list(dict.fromkeys(name for _, _, sets in rows for name in sets))
    table = [(*HEAD[:PLACE], *(f"accuracy {name}" for name in names), *HEAD[PLACE:])]
    table += [(*row[:PLACE], *(sets.get(name, UNKNOWN) for name in names), *row[PLACE:]) for _, row, sets in rows]
    others = sum(path.is_dir() for path in Path(root).iterdir()) - len(runs)
    note = [f"{others} folder{' is' if others == 1 else 's are'} no run"] if others else []
    return [*columns(table), *note]


def _started_at(run: RunRecords) -> float:
    """0 if it is not known."""
    try:
        return run.started_at() or 0.0
    except (ValueError, KeyError, TypeError, PenstockError):  # a broken line
        return 0.0


def _row(run: RunRecords) -> tuple[tuple[str, ...], dict[str, str]]:
    """The cells of a run, and its accuracy on each held-out set beside the main one, by name."""
    started_at = _started_at(run)
    started = datetime.fromtimestamp(started_at).strftime("%Y-%m-%d %H:%M") if started_at else UNKNOWN
    try:
        figures = run.figures()
        model = str(run.config().get("actor", {}).get("path", "-"))
    except PenstockError as error:
        return (run.name, run.state().name, "-", "-", "-", "-", started, "-", str(error)), {}
    sets = {name: _held_out(of_set(figures, name), "accuracy") for name in figures["heldout_sets"]}
    cells = (
        run.name,
        run.state().name,
        str(figures["steps"]),
        _from_to(figures["reward_mean_first"], figures["reward_mean_last"]),
        _held_out(figures, "accuracy"),
        _held_out(figures, "reward"),
        started,
        duration(figures["seconds_training"]),
        model if len(model) <= MODEL_CHARACTERS else f"...{model[3 - MODEL_CHARACTERS :]}",
    )
    return cells, sets


def _held_out(figures: Mapping[str, Any], name: str) -> str:
    """The figure of the first and of the last evaluation; of how many prompts, behind the accuracy alone."""
    if figures["heldout_steps_end"] is None:
        return UNKNOWN
    shown = heldout_figure if name == "accuracy" else _plain
    start, end = (shown(figures, name, when) for when in ("start", "end"))
    return end if figures["heldout_steps_start"] == figures["heldout_steps_end"] else f"{start} -> {end}"


def _plain(figures: Mapping[str, Any], name: str, when: str) -> str:
    return number(figures[f"heldout_{name}_{when}"])


def _from_to(start: float | None, end: float | None) -> str:
    return "-" if start is None and end is None else f"{number(start)} -> {number(end)}"

"""Draws docs/baselines.md and its pictures from the raw lines alone.

Owns the tables. The text of the page stands around them: each is between two comments that name it. Invariant: the same
lines and the same versions of the libraries give the same bytes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.baselines.cells import LAGS, STUDY, Cell, grid
from benchmarks.baselines.figures import draw_curves, draw_lags, draw_learning, draw_scores
from benchmarks.baselines.launched import tables
from benchmarks.baselines.launched.tasks import TASKS
from benchmarks.baselines.lines import LaunchedLine, Line, TrlLine, read_lines
from benchmarks.baselines.objectives import OBJECTIVES
from benchmarks.baselines.scores import area, final_score, interval, worst_fall

TRL_LINES = "trl"  # their file
DRAWN = re.compile(r"(<!-- drawn: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Lines = Mapping[Cell, Line]


@dataclass(frozen=True)
class Measured:
    """Everything that was measured: the runs of the study, those of launched tasks, and TRL's."""

    study: Lines = field(default_factory=dict)
    launched: Mapping[Cell, LaunchedLine] = field(default_factory=dict)
    trl: Mapping[Cell, TrlLine] = field(default_factory=dict)


def lines_path(page: Path, task: str) -> Path:
    """The raw lines of a task, in a folder of the page's name beside it."""
    return page.with_suffix("") / f"{task}.jsonl"


def read_measured(page: Path) -> Measured:
    """The raw lines of all tasks."""
    launched = [read_lines(lines_path(page, task), LaunchedLine) for task in TASKS]
    return Measured(
        read_lines(lines_path(page, STUDY), Line),
        {cell: line for found in launched for cell, line in found.items()},
        read_lines(lines_path(page, TRL_LINES), TrlLine),
    )


def drawn_page(text: str, measured: Measured) -> str:
    """The text of the page with each table drawn anew."""
    study, launched = measured.study, measured.launched
    drawn: dict[str, Callable[[], str]] = {
        "learning": lambda: tables.learning(launched),
        "learning-state": lambda: tables.state(launched),
        "gsm8k": lambda: tables.gsm8k(launched),
        "trl": lambda: tables.beside_trl(launched, measured.trl),
        "lags": lambda: tables.lags(launched),
        "state": lambda: _state(study),
        "final": lambda: _table(study, final_score),
        "area": lambda: _table(study, area),
        "fall": lambda: _table(study, worst_fall),
        "signs": lambda: _signs(study),
    }

    def draw(found: re.Match[str]) -> str:
        return f"{found[1]}{drawn[found['name']]()}\n{found[3]}"

    return DRAWN.sub(draw, text)


def drawn_pictures(measured: Measured) -> dict[str, bytes]:
    """The pictures of the page by file name, as SVG."""
    return {
        "learning.svg": draw_learning(measured.launched, measured.trl),
        "lags.svg": draw_lags(measured.launched),
        "scores.svg": draw_scores(measured.study),
        "curves.svg": draw_curves(measured.study),
    }


def write_page(page: Path, measured: Measured) -> None:
    """Write the page and its pictures, which lie in a folder of the page's name beside it."""
    page.write_text(drawn_page(page.read_text(encoding="utf-8"), measured), encoding="utf-8")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, data in drawn_pictures(measured).items():
        (folder / name).write_bytes(data)


def drifted(page: Path, measured: Measured) -> list[str]:
    """The files that are not what the raw lines draw."""
    text = page.read_text(encoding="utf-8")
    found = [page.name] if drawn_page(text, measured) != text else []
    for name, data in drawn_pictures(measured).items():
        path = page.with_suffix("") / name
        if not path.exists() or path.read_bytes() != data:
            found.append(f"{page.stem}/{name}")
    return found


def _state(lines: Lines) -> str:
    wanted = list(grid())
    measured = [lines[cell] for cell in wanted if cell in lines]
    machines = sorted({line.machine for line in measured})
    versions = sorted({", ".join(f"{name} {of}" for name, of in line.versions.items()) for line in measured})
    seconds = sum(line.cpu_seconds for line in measured)
    return (
        f"{len(measured)} of {len(wanted)} runs are measured, in {seconds / 60:.0f} CPU minutes, on "
        f"{'; '.join(machines) or 'no machine'}, with {'; '.join(versions) or 'nothing'}."
    )


def _table(lines: Lines, score: Callable[[Line], float]) -> str:
    rows = ["| Objective | " + " | ".join(f"lag {lag}" for lag in LAGS) + " |", "| --- |" + " --- |" * len(LAGS)]
    for objective in OBJECTIVES:
        cells = " | ".join(_entry(lines, objective, lag, score) for lag in LAGS)
        rows.append(f"| {objective} | {cells} |")
    return "\n".join(rows)


def _median(values: Sequence[float | None]) -> float | None:
    """Of those that were measured, if any were."""
    measured = [value for value in values if value is not None]
    return float(np.median(measured)) if measured else None


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _entry(lines: Lines, objective: str, lag: int, score: Callable[[Line], float]) -> str:
    found = runs_of(lines, objective, lag)
    return str(interval(map(score, found))) if found else "not measured"


def runs_of(lines: Lines, objective: str, lag: int) -> list[Line]:
    """The measured runs of an objective at a lag, by seed."""
    cells = [cell for cell in lines if (cell.objective, cell.lag) == (objective, lag)]
    return [lines[cell] for cell in sorted(cells, key=lambda cell: cell.seed)]


def _signs(lines: Lines) -> str:
    """Effective sample size and KL of the first half of the runs, by how the runs ended."""
    rows = [
        "| Final score | Runs | Effective sample size, first half | KL to the sampler, first half |",
        "| --- | --- | --- | --- |",
    ]
    for low, high in ((0.9, 1.01), (0.7, 0.9), (0.5, 0.7), (0.0, 0.5)):
        found = [line for line in lines.values() if line.cell.lag and low <= final_score(line) < high]
        shown = f"{low:g} to {min(high, 1.0):g}"
        if not found:
            rows.append(f"| {shown} | 0 | - | - |")
            continue
        half = [line.num_steps // 2 for line in found]
        samples = _median([_median(line.effective_sample_size[:n]) for line, n in zip(found, half, strict=True)])
        divergence = _median([_median(line.behaviour_kl[:n]) for line, n in zip(found, half, strict=True)])
        figures = _shown(samples, 2), _shown(divergence, 3)
        rows.append(f"| {shown} | {len(found)} | {' | '.join(figures)} |")
    return "\n".join(rows)

"""`python -m benchmarks.baselines`: measure what is not measured yet, and draw the page of it.

    .venv/bin/python -m benchmarks.baselines                     everything that is missing, then the page
    .venv/bin/python -m benchmarks.baselines --task addition     only these cells
    .venv/bin/python -m benchmarks.baselines --task sorting --only ppo --lag 8   only these of the study
    .venv/bin/python -m benchmarks.baselines --only TRL          TRL's runs of addition
    .venv/bin/python -m benchmarks.baselines --draw              draw without training
    .venv/bin/python -m benchmarks.baselines --check             the same, but fails if the page has drifted
    .venv/bin/python -m benchmarks.baselines --lines /tmp/again --only ppo --seed 1   measure some cells again
    .venv/bin/python -m benchmarks.baselines --task gsm8k --rows FOLDER   GSM8K from a folder instead of the hub
    .venv/bin/python -m benchmarks.baselines --task gsm8k --read   the line of a run that is not at its end

It may be ended at any time: each run that has ended has its line. The next call goes on, also within a launched run.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.baselines import measure as study
from benchmarks.baselines import trl
from benchmarks.baselines.cells import LAGS, SEEDS, STUDY, Cell, grid, lags_grid, launched_grid
from benchmarks.baselines.launched import measure as launched
from benchmarks.baselines.launched.tasks import OWN_LOSS, TASKS
from benchmarks.baselines.lines import TRL_LOSS
from benchmarks.baselines.objectives import OBJECTIVES
from benchmarks.baselines.page import TRL_LINES, drifted, lines_path, read_measured, write_page
from benchmarks.baselines.sorting.model import warmed_up

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "baselines.md"


def main() -> None:
    """Measure or check."""
    arguments = _parser().parse_args()
    if arguments.check:
        sys.exit(_check())
    page = arguments.lines / PAGE.name if arguments.lines else PAGE
    if arguments.read:
        _read(arguments, page)
    elif not arguments.draw:
        _measure(arguments, page)
    if page == PAGE:
        write_page(PAGE, read_measured(PAGE))


def _measure(arguments: argparse.Namespace, page: Path) -> None:
    cells = _chosen(arguments)
    of_study = [cell for cell in cells if cell.task == STUDY]
    if of_study:
        study.measure(of_study, warmed_up(arguments.models), lines_path(page, STUDY), _say)
    trl.measure(
        [cell for cell in cells if cell.objective == TRL_LOSS],
        lines_path(page, TRL_LINES),
        _say,
        shared=arguments.shared,
    )
    launched.measure(
        _launched(cells),
        arguments.runs,
        lambda task: lines_path(page, task),
        _say,
        rows=arguments.rows,
        shared=arguments.shared,
    )


def _read(arguments: argparse.Namespace, page: Path) -> None:
    """The lines of launched runs as far as they are."""
    for cell in _launched(_chosen(arguments)):
        run = arguments.runs / launched.folder_name(cell)
        if run.exists():
            launched.keep_line(lines_path(page, cell.task), cell, run, shared=arguments.shared)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw from the raw lines, and fail on drift")
    parser.add_argument("--draw", action="store_true", help="draw from the raw lines; measure nothing")
    parser.add_argument("--task", choices=[STUDY, *TASKS], action="append", help="may be repeated")
    parser.add_argument(
        "--only", choices=[OWN_LOSS, TRL_LOSS, *OBJECTIVES], action="append", help="an objective, a task's own, or TRL"
    )
    parser.add_argument("--lag", type=int, choices=LAGS, action="append")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append")
    parser.add_argument("--lines", type=Path, help="a folder for the raw lines; the page stays as it is")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="where the warmed-up model is kept")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "baselines", help="folders of launched runs")
    parser.add_argument("--rows", default="", help="a folder with the rows of a task of the hub")
    parser.add_argument("--shared", action="store_true", help="note that other work runs on this machine")
    parser.add_argument("--read", action="store_true", help="read the runs as they are now; launch nothing")
    return parser


def _chosen(arguments: argparse.Namespace) -> list[Cell]:
    return [
        cell
        for cell in (*grid(), *launched_grid(), *trl.trl_cells(SEEDS), *lags_grid())
        if cell.task in (arguments.task or [cell.task])
        and cell.objective in (arguments.only or [cell.objective])
        and cell.lag in (arguments.lag or [cell.lag])
        and cell.seed in (arguments.seed or [cell.seed])
    ]


def _launched(cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.task != STUDY and cell.objective != TRL_LOSS]


def _say(text: str) -> None:
    print(text, flush=True)


def _check() -> int:
    found = drifted(PAGE, read_measured(PAGE))
    for name in found:
        print(f"docs/{name} is not what the raw lines in docs/{PAGE.stem}/ draw; run `python -m benchmarks.baselines`")
    return 1 if found else 0


if __name__ == "__main__":
    main()

"""`python -m benchmarks.baselines`: measure what is not measured yet, and draw the page of it.

    .venv/bin/python -m benchmarks.baselines                     everything that is missing, then the page
    .venv/bin/python -m benchmarks.baselines --only ppo --lag 8  only these cells
    .venv/bin/python -m benchmarks.baselines --check             draw without training; fails if the page has drifted
    .venv/bin/python -m benchmarks.baselines --lines /tmp/again.jsonl --only ppo --seed 1   measure some cells again

It may be ended at any time: each run that has ended has its line, and the next call goes on.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.baselines.cells import LAGS, SEEDS, grid
from benchmarks.baselines.lines import read_lines
from benchmarks.baselines.measure import measure
from benchmarks.baselines.objectives import OBJECTIVES
from benchmarks.baselines.page import drifted, write_page
from benchmarks.baselines.sorting.model import warmed_up

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "baselines.md"
LINES = ROOT / "docs" / "baselines" / "sorting.jsonl"


def main() -> None:
    """Measure or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="draw from the raw lines, and fail on drift")
    parser.add_argument("--only", choices=list(OBJECTIVES), action="append", help="an objective; may be repeated")
    parser.add_argument("--lag", type=int, choices=LAGS, action="append")
    parser.add_argument("--seed", type=int, choices=SEEDS, action="append")
    parser.add_argument("--lines", type=Path, default=LINES, help="the raw lines (the page: of the default only)")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="where the warmed-up model is kept")
    arguments = parser.parse_args()
    if arguments.check:
        sys.exit(_check())
    cells = [
        cell
        for cell in grid()
        if cell.objective in (arguments.only or OBJECTIVES)
        and cell.lag in (arguments.lag or LAGS)
        and cell.seed in (arguments.seed or SEEDS)
    ]
    measure(cells, warmed_up(arguments.models), arguments.lines, lambda text: print(text, flush=True))
    if arguments.lines == LINES:
        write_page(PAGE, read_lines(LINES))


def _check() -> int:
    found = drifted(PAGE, read_lines(LINES))
    for name in found:
        print(f"docs/{name} is not what docs/baselines/{LINES.name} draws; run `python -m benchmarks.baselines`")
    return 1 if found else 0


if __name__ == "__main__":
    main()

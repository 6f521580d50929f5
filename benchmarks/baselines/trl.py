"""Measures TRL's runs of the addition task, one a seed, and writes a line of each.

TRL is set and written for this machine as `benchmarks.against_trl` has it (level `code`), and trained for as many steps
on as many completions of the same prompts as Penstock's own cells of this task.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.against_trl.__main__ import OUT, install_trl, train_trl
from benchmarks.baselines.cells import ADDITION, Cell
from benchmarks.baselines.lines import TRL_LOSS, TrlLine, add_line, machine, read_lines, short

NUM_STEPS, GROUP_SIZE = 40, 24  # those of examples/demo
THREADING = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}  # the fastest of those that against_trl tries


def trl_cells(seeds: Iterable[int]) -> list[Cell]:
    """A cell a seed. TRL trains what it has just sampled: its lag is 0."""
    return [Cell(TRL_LOSS, 0, seed, ADDITION) for seed in seeds]


def measure(cells: Iterable[Cell], path: Path, say: Callable[[str], None], *, shared: bool) -> int:
    """Train the cells that have no line; returns how many. SystemExit with what failed ends it.

    shared: whether other work runs on this machine meanwhile.
    """
    missing = [cell for cell in cells if cell not in read_lines(path, TrlLine)]
    if missing:
        install_trl()
        OUT.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(missing):
        say(f"{number + 1} of {len(missing)}: {cell}")
        add_line(path, _trained(cell, shared=shared))
    return len(missing)


def _trained(cell: Cell, *, shared: bool) -> TrlLine:
    result, sampler = train_trl("code", NUM_STEPS, GROUP_SIZE, cell.seed, THREADING)
    return TrlLine(
        cell=cell,
        num_steps=len(result["steps"]),
        reward=short(step["reward_mean"] for step in result["steps"]),
        held_out=tuple((each["steps"], float(f"{each['accuracy']:.4g}")) for each in result["evals"]),
        cpu_seconds=round(sampler.total, 1),
        beside_other_work=shared,
        versions=dict(result["versions"]),
        machine=machine(),
    )

"""The raw lines: what each run measured, one JSON line a run, committed with the page that is drawn of them.

Owns the file. Invariant: a line is complete or absent, and a cell has one; what is there is not measured again.
"""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec

from benchmarks.baselines.cells import Cell
from penstock.durable import write_durably


class Line(msgspec.Struct, frozen=True):
    """One run.

    learning_rate, num_steps: what the cell does not say. versions: of the software; machine: its processor.
    reward, effective_sample_size, behaviour_kl: of each step; held_out: after 0, every, ... steps; mean_lag: over the
    tokens of the second half of the run; cpu_seconds: of the whole process.
    """

    cell: Cell
    learning_rate: float
    num_steps: int
    reward: tuple[float, ...]
    held_out: tuple[float, ...]
    effective_sample_size: tuple[float, ...]
    behaviour_kl: tuple[float, ...]
    mean_lag: float
    cpu_seconds: float
    versions: dict[str, str]
    machine: str


def read_lines(path: Path) -> dict[Cell, Line]:
    """The line of each cell that was measured; empty if there is no file."""
    if not path.exists():
        return {}
    lines = (msgspec.json.decode(line, type=Line) for line in path.read_bytes().splitlines())
    return {line.cell: line for line in lines}


def add_line(path: Path, line: Line) -> None:
    """Add a line; a run of the same cell is replaced. The file stays in the order of objectives, lags and seeds."""
    lines = read_lines(path) | {line.cell: line}
    data = b"".join(msgspec.json.encode(each) + b"\n" for each in _in_order(lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)


def _in_order(lines: dict[Cell, Line]) -> Iterator[Line]:
    for cell in sorted(lines, key=lambda cell: (cell.objective, cell.lag, cell.seed)):
        yield lines[cell]


def machine() -> str:
    """Processor and cores of this machine."""
    names = (line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {len(os.sched_getaffinity(0))} cores"


def _cpu_info() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

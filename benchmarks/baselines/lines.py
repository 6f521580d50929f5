"""The raw lines: what each run measured, one JSON line a run, committed with the page that is drawn of them.

Owns the files. Invariant: a line is complete or absent, and a cell has one; what is there is not measured again.
"""

import math
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks.baselines.cells import Cell
from penstock.durable import write_durably

SOFTWARE = ("penstock", "torch", "transformers")
KEYS_FILE = "keys.json"
TRL_LOSS = "TRL"  # the objective of a cell that TRL trains


class Line(msgspec.Struct, frozen=True):
    """One run of the study.

    learning_rate, num_steps: what the cell does not say. versions: of the software; machine: its processor.
    reward, effective_sample_size, behaviour_kl: of each step, the last two None if no token of it had an advantage;
    held_out: after 0, every, ... steps; mean_lag: over the tokens of the second half of the run; cpu_seconds: of the
    whole process.
    """

    cell: Cell
    learning_rate: float
    num_steps: int
    reward: tuple[float, ...]
    held_out: tuple[float, ...]
    effective_sample_size: tuple[float | None, ...]
    behaviour_kl: tuple[float | None, ...]
    mean_lag: float
    cpu_seconds: float
    versions: dict[str, str]
    machine: str


class LaunchedLine(msgspec.Struct, frozen=True):
    """One run of a launched task.

    configuration: digest of all keys that decide what it computes; keys: the id of their names, of which later releases
    have more (`read_keys`). reward, effective_sample_size, behaviour_kl: of each
    step, the last two None if they are not finite. held_out: (steps trained, accuracy) of each evaluation;
    held_out_rewards: for each reward function the mean of each evaluation. mean_lag: over all steps. tokens: sampled
    for training. cpu_seconds: of all processes of the run, its share of the engine included, start and evaluations
    too. beside_other_work: whether the machine was shared, so that times on a clock would mean nothing; none is kept.
    """

    cell: Cell
    configuration: str
    keys: str
    num_steps: int
    reward: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    held_out_rewards: dict[str, tuple[float, ...]]
    effective_sample_size: tuple[float | None, ...]
    behaviour_kl: tuple[float | None, ...]
    mean_lag: float
    tokens: int
    cpu_seconds: float
    beside_other_work: bool
    versions: dict[str, str]
    machine: str


class TrlLine(msgspec.Struct, frozen=True):
    """One run of TRL. What has the name of a `LaunchedLine`'s field is the same; cpu_seconds: of its one process."""

    cell: Cell
    num_steps: int
    reward: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    cpu_seconds: float
    beside_other_work: bool
    versions: dict[str, str]
    machine: str


AnyLine = TypeVar("AnyLine", Line, LaunchedLine, TrlLine)


def read_lines(path: Path, kind: type[AnyLine]) -> dict[Cell, AnyLine]:
    """The line of each cell that was measured; empty if there is no file."""
    if not path.exists():
        return {}
    lines = (msgspec.json.decode(line, type=kind) for line in path.read_bytes().splitlines())
    return {line.cell: line for line in lines}


def add_line(path: Path, line: AnyLine) -> None:
    """Add a line; a run of the same cell is replaced. The file stays in the order of objectives, lags and seeds."""
    lines = {**read_lines(path, type(line)), line.cell: line}
    data = b"".join(msgspec.json.encode(lines[cell]) + b"\n" for cell in _in_order(lines))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)


def _in_order(cells: Iterable[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: (cell.task, cell.objective, cell.lag, cell.seed))


def add_keys(folder: Path, names: Iterable[str]) -> str:
    """Keep the names of keys beside the lines of launched runs, once; returns their id."""
    known, wanted = read_keys(folder), sorted(names)
    found = next((name for name, kept in known.items() if kept == wanted), "")
    if not found:
        found = str(len(known) + 1)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / KEYS_FILE, msgspec.json.format(msgspec.json.encode({**known, found: wanted})) + b"\n")
    return found


def read_keys(folder: Path) -> dict[str, list[str]]:
    """By id: the names of all keys that decided what a run computes, when lines of launched runs were measured."""
    path = folder / KEYS_FILE
    return msgspec.json.decode(path.read_bytes(), type=dict[str, list[str]]) if path.exists() else {}


def short(values: Iterable[float]) -> tuple[float, ...]:
    """Four digits of each, as a line keeps them."""
    return tuple(float(f"{value:.4g}") for value in values)


def short_or_none(values: Iterable[float]) -> tuple[float | None, ...]:
    """The same, and None for what is not finite, such as a figure of no tokens."""
    return tuple(float(f"{value:.4g}") if math.isfinite(value) else None for value in values)


def versions() -> dict[str, str]:
    """Of the software that decides what a run computes."""
    return {name: version(name) for name in SOFTWARE}


def machine() -> str:
    """Processor and cores of this machine."""
    names = (line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {len(os.sched_getaffinity(0))} cores"


def _cpu_info() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

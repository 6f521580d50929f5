"""Measures cells of launched tasks: launches each that has no line yet, and writes its line.

Owns the folder of each run while it is measured, and the files of its name beside it. A run that was interrupted goes
on where it stopped, and a run that has ended is read and not trained again: both are what `penstock launch` does with a
run's folder. Invariant: all of a run was trained with the configuration whose digest its line has.
"""

import asyncio
import json
import math
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.baselines.cells import Cell
from benchmarks.baselines.launched.bench import Bench, running_bench
from benchmarks.baselines.launched.tasks import ROOT, configuration
from benchmarks.baselines.lines import (
    LaunchedLine,
    add_keys,
    add_line,
    machine,
    read_lines,
    short,
    short_or_none,
    versions,
)
from penstock.config import Config
from penstock.config.identity import digest_of, identifying_keys
from penstock.config.shown import as_yaml, changed
from penstock.errors import PenstockError
from penstock.records import RunRecords
from penstock.runtime.process import tied_command

CPU_SECONDS = ".cpu.json"  # what each life of the run used, but for one that ended with this process
DIGEST = ".digest"  # of the configuration with which the run began
# On a machine that does other work, a process may get no time for minutes. None of this decides what is computed.
PATIENCE = {
    "run.stall_seconds": "3600",
    "staleness.heartbeat_seconds": "120",
    "staleness.claim_idle_seconds": "1200",
    "rollout.engine.request_timeout_seconds": "3600",
    "rollout.engine.start_timeout_seconds": "1800",
    "weights.push_timeout_seconds": "1800",
}


class RunFailedError(PenstockError):
    """A launch ended before its run did."""


def measure(
    cells: Iterable[Cell],
    folder: Path,
    lines_of: Callable[[str], Path],
    say: Callable[[str], None],
    *,
    rows: str,
    shared: bool,
) -> int:
    """Launch the cells that have no line; returns how many. RunFailedError ends it.

    folder: of the runs. lines_of: the file of a task's lines. rows: see `configuration`. shared: whether other work
    runs on this machine meanwhile.
    """
    missing = [cell for cell in cells if cell not in read_lines(lines_of(cell.task), LaunchedLine)]
    for task, found in groupby(missing, key=lambda cell: cell.task):
        (folder / _bench_name(task)).mkdir(parents=True, exist_ok=True)
        asyncio.run(_measure_task(list(found), folder, lines_of(task), say, rows, shared))
    return len(missing)


async def _measure_task(
    cells: Sequence[Cell], folder: Path, lines: Path, say: Callable[[str], None], rows: str, shared: bool
) -> None:
    async with running_bench(_config(cells[0], rows), folder / _bench_name(cells[0].task)) as bench:
        for number, cell in enumerate(cells):
            say(f"{number + 1} of {len(cells)}: {cell}")
            run = await launch(cell, folder, bench, rows)
            keep_line(lines, cell, run, shared=shared)


def _bench_name(task: str) -> str:
    return f"bench-{task}"


def folder_name(cell: Cell) -> str:
    """The name of a cell's run."""
    words = f"{cell.task}-{cell.objective}-{cell.lag}-{cell.seed}"
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in words)


def _config(cell: Cell, rows: str = "", further: dict[str, str] | None = None) -> Config:
    keys = {"run.name": folder_name(cell), "run.existing": "resume", **PATIENCE, **(further or {})}
    return configuration(cell.task, cell.objective, cell.lag, cell.seed, rows, keys)


def digest(cell: Cell, names: Sequence[str] | None = None) -> str:
    """Of the configuration of a cell, wherever its rows and its engine are.

    names: only of these keys, those of an earlier release; one that there is no more is None.
    """
    keys = identifying_keys(_config(cell))
    return digest_of(keys if names is None else {name: keys.get(name) for name in names})


async def launch(cell: Cell, folder: Path, bench: Bench, rows: str = "") -> Path:
    """Train a cell to its end; returns the run's folder. RunFailedError with the end of its output if it fails."""
    config = _config(cell, rows, {"run.root": str(folder), **bench.keys})
    run = folder / folder_name(cell)
    _begin(cell, run)
    file = run.with_suffix(".yaml")
    file.write_text(as_yaml(changed(config)), encoding="utf-8")
    command = [sys.executable, "-m", "penstock_launch", "launch", "local", "--config", str(file)]
    engine_before, others_before = bench.cpu_seconds(), _children_seconds()
    with run.with_suffix(".log").open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *tied_command(command, signal.SIGTERM),
            cwd=ROOT,
            env=bench.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
        )
        code = await process.wait()
    _add_cpu_seconds(run, bench.cpu_seconds() - engine_before + _children_seconds() - others_before)
    if code != 0:
        said = run.with_suffix(".log").read_text(errors="replace")[-2000:]
        raise RunFailedError(f"the launch of {cell} ended with {code}: expected 0; it said\n{said}")
    return run


def _begin(cell: Cell, run: Path) -> None:
    """Note the configuration of a new run; RunFailedError if an earlier life of it had another."""
    path = run.with_suffix(DIGEST)
    if not path.exists():
        path.write_text(digest(cell), encoding="ascii")
    _require_begun_with(cell, run)


def _require_begun_with(cell: Cell, run: Path) -> None:
    path = run.with_suffix(DIGEST)
    if (before := path.read_text(encoding="ascii")) != digest(cell):
        raise RunFailedError(
            f"{run} was begun with the configuration {before}, and that of {cell} is {digest(cell)}: expected the "
            f"same; remove {run} and {path} to begin anew, or give another folder (--runs)"
        )


def _children_seconds() -> float:
    """CPU seconds of all descendants that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _add_cpu_seconds(run: Path, seconds: float) -> None:
    run.with_suffix(CPU_SECONDS).write_text(json.dumps([*_cpu_seconds(run), round(seconds, 1)]), encoding="utf-8")


def _cpu_seconds(run: Path) -> list[float]:
    path = run.with_suffix(CPU_SECONDS)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def keep_line(lines: Path, cell: Cell, run: Path, *, shared: bool) -> None:
    """Write the line of a run as far as it has been trained; RunFailedError if it has another configuration."""
    _require_begun_with(cell, run)
    add_line(lines, line_of(cell, run, add_keys(lines.parent, identifying_keys(_config(cell))), shared=shared))


def line_of(cell: Cell, run: Path, keys: str, *, shared: bool) -> LaunchedLine:
    """What a run's folder says, as far as it has been trained. keys: the id of the names of today's keys."""
    records = RunRecords(run)
    steps = list(records.steps())
    evals = sorted(records.evaluations(), key=lambda line: int(line["steps"]))
    functions = sorted({name for line in evals for name in line.get("rewards", {})})
    return LaunchedLine(
        cell=cell,
        configuration=run.with_suffix(DIGEST).read_text(encoding="ascii"),
        keys=keys,
        num_steps=len(steps),
        reward=short(line["reward_mean"] for line in steps),
        held_out=tuple((line["steps"], float(f"{line['accuracy']:.4g}")) for line in evals),
        held_out_rewards={name: short(line["rewards"][name]["mean"] for line in evals) for name in functions},
        effective_sample_size=_statistic(steps, "effective_sample_size_ratio"),
        behaviour_kl=_statistic(steps, "behaviour_kl"),
        mean_lag=round(sum(line["staleness_mean"] for line in steps) / max(1, len(steps)), 3),
        tokens=sum(line["generated_tokens"] for line in steps),
        cpu_seconds=round(sum(_cpu_seconds(run)), 1),
        beside_other_work=shared,
        versions=versions(),
        machine=machine(),
    )


def _statistic(steps: Iterable[Mapping[str, Any]], name: str) -> tuple[float | None, ...]:
    return short_or_none(line["statistics"].get(name, math.nan) for line in steps)

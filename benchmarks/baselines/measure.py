"""Measures cells of the study: trains each that has no line yet, and writes its line."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from benchmarks.baselines.cells import LEARNING_RATE, NUM_STEPS, Cell
from benchmarks.baselines.lines import Line, add_line, machine, read_lines, short, short_or_none, versions
from benchmarks.baselines.objectives import loss_keys
from benchmarks.baselines.sorting.training import Curve, train


def measure(cells: Iterable[Cell], model: Path, lines: Path, say: Callable[[str], None]) -> int:
    """Train the cells that `lines` lacks; returns how many. One that is interrupted leaves no line."""
    torch.set_num_threads(1)
    missing = [cell for cell in cells if cell not in read_lines(lines, Line)]
    for number, cell in enumerate(missing):
        say(f"{number + 1} of {len(missing)}: {cell}")
        add_line(lines, measured(cell, model))
    return len(missing)


def measured(cell: Cell, model: Path, num_steps: int = NUM_STEPS) -> Line:
    """Train one cell."""
    before = time.process_time()
    keys = {"optimizer": {"lr": LEARNING_RATE, "beta2": 0.99}, "loss": loss_keys(cell.objective)}
    curve = train(model, keys, lag=cell.lag, seed=cell.seed, num_steps=num_steps)
    return _line(cell, curve, num_steps, time.process_time() - before)


def _line(cell: Cell, curve: Curve, num_steps: int, cpu_seconds: float) -> Line:
    return Line(
        cell=cell,
        learning_rate=LEARNING_RATE,
        num_steps=num_steps,
        reward=short(curve.reward),
        held_out=short(curve.held_out),
        effective_sample_size=short_or_none(curve.effective_sample_size),
        behaviour_kl=short_or_none(curve.behaviour_kl),
        mean_lag=float(np.mean(curve.lag[num_steps // 2 :])),
        cpu_seconds=round(cpu_seconds, 1),
        versions=versions(),
        machine=machine(),
    )

"""From the raw lines of launched tasks to the tables of the page.

Pure. A cell that was not measured says so.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from benchmarks.baselines.cells import Cell, launched_grid
from benchmarks.baselines.launched.tasks import TASKS
from benchmarks.baselines.lines import LaunchedLine

Lines = Mapping[Cell, LaunchedLine]
WINDOW_STEPS = 5
GSM8K = "gsm8k"
NOT_MEASURED = "not measured yet"


def learning(lines: Lines) -> str:
    """One row a task: what it began with, what it reached, and what that took."""
    columns: Mapping[str, Callable[[LaunchedLine], float]] = {
        "held out before": lambda line: line.held_out[0][1],
        "held out after": lambda line: line.held_out[-1][1],
        "reward, first steps": lambda line: float(np.mean(line.reward[:WINDOW_STEPS])),
        "reward, last steps": lambda line: float(np.mean(line.reward[-WINDOW_STEPS:])),
    }
    rows = [
        f"| Task | seeds | steps | {' | '.join(columns)} | mean lag | tokens sampled | CPU s |",
        "| --- | --- | ---: |" + " --- |" * len(columns) + " ---: | ---: | ---: |",
    ]
    wanted = list(launched_grid())
    for task in TASKS:
        cells = [cell for cell in wanted if cell.task == task]
        found = [lines[cell] for cell in cells if cell in lines]
        if not found:
            rows.append(f"| {task} | 0 of {len(cells)} | {NOT_MEASURED} |" + " |" * (len(columns) + 3))
            continue
        entries = " | ".join(spread(map(column, found)) for column in columns.values())
        steps = "/".join(sorted({str(line.num_steps) for line in found}))
        lag = np.mean([line.mean_lag for line in found])
        tokens = np.mean([line.tokens for line in found])
        cpu = np.mean([line.cpu_seconds for line in found])
        rows.append(
            f"| {task} | {len(found)} of {len(cells)} | {steps} | {entries} | {lag:.2f} | {tokens:.0f} | {cpu:.0f} |"
        )
    return "\n".join(rows)


def gsm8k(lines: Lines) -> str:
    """One row an evaluation of the run: the share of held-out problems that each reward function accepts."""
    runs = [line for cell, line in lines.items() if cell.task == GSM8K]
    if not runs:
        return f"The run on the CPU is {NOT_MEASURED}."
    names = list(runs[0].held_out_rewards)
    rows = [f"| Steps | {' | '.join(f'`{name}`' for name in names)} |", "| ---: |" + " ---: |" * len(names)]
    for line in runs:
        for number, (steps, _) in enumerate(line.held_out):
            values = " | ".join(f"{line.held_out_rewards[name][number]:.3f}" for name in names)
            rows.append(f"| {steps} | {values} |")
    return "\n".join(rows)


def state(lines: Lines) -> str:
    """How much is measured, where and with what."""
    wanted = list(launched_grid())
    measured = [lines[cell] for cell in wanted if cell in lines]
    if not measured:
        return f"0 of {len(wanted)} runs are measured."
    beside = sum(line.beside_other_work for line in measured)
    return (
        f"{len(measured)} of {len(wanted)} runs are measured, {beside} of them beside other work on the same cores, on "
        f"{_all(line.machine for line in measured)}, with "
        f"{_all(', '.join(f'{name} {of}' for name, of in line.versions.items()) for line in measured)}."
    )


def spread(values: Iterable[float]) -> str:
    """The mean, and the range of more than one value.

    >>> spread([0.5, 1.0]), spread([0.25])
    ('0.75 (0.50 to 1.00)', '0.25')
    """
    found: Sequence[float] = list(values)
    mean = f"{float(np.mean(found)):.2f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.2f} to {max(found):.2f})"


def _all(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts)))

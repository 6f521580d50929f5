"""From the raw lines of launched tasks to the tables of the page.

Pure. A cell that was not measured says so.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from benchmarks.baselines.cells import (
    ADDITION,
    LAGS_LAUNCHED,
    LAGS_OBJECTIVES,
    SEEDS,
    Cell,
    lags_grid,
    launched_grid,
)
from benchmarks.baselines.launched.tasks import OWN_LOSS, TASKS
from benchmarks.baselines.lines import LaunchedLine, TrlLine

Lines = Mapping[Cell, LaunchedLine]
WINDOW_STEPS = 5
GOAL = 0.9  # of held-out accuracy
GSM8K = "gsm8k"
NOT_MEASURED = "not measured yet"


LEARNED: Mapping[str, Callable[[LaunchedLine | TrlLine], float]] = {
    "held out before": lambda line: line.held_out[0][1],
    "held out after": lambda line: line.held_out[-1][1],
    "reward, first steps": lambda line: float(np.mean(line.reward[:WINDOW_STEPS])),
    "reward, last steps": lambda line: float(np.mean(line.reward[-WINDOW_STEPS:])),
}


def learning(lines: Lines) -> str:
    """One row a task: what it began with, what it reached, and what that took."""
    rows = [
        f"| Task | seeds | steps | {' | '.join(LEARNED)} | mean lag | tokens sampled | CPU s |",
        "| --- | --- | ---: |" + " --- |" * len(LEARNED) + " ---: | ---: | ---: |",
    ]
    wanted = list(launched_grid())
    for task in TASKS:
        cells = [cell for cell in wanted if cell.task == task]
        found = [lines[cell] for cell in cells if cell in lines]
        if not found:
            rows.append(f"| {task} | 0 of {len(cells)} | {NOT_MEASURED} |" + " |" * (len(LEARNED) + 3))
            continue
        entries = " | ".join(spread(map(column, found)) for column in LEARNED.values())
        steps = "/".join(sorted({str(line.num_steps) for line in found}))
        lag = np.mean([line.mean_lag for line in found])
        tokens = np.mean([line.tokens for line in found])
        cpu = np.mean([line.cpu_seconds for line in found])
        rows.append(
            f"| {task} | {len(found)} of {len(cells)} | {steps} | {entries} | {lag:.2f} | {tokens:.0f} | {cpu:.0f} |"
        )
    return "\n".join(rows)


def beside_trl(lines: Lines, trl: Mapping[Cell, TrlLine]) -> str:
    """Penstock's own cells and TRL's on the same seeds."""
    sides: Mapping[str, Sequence[LaunchedLine | TrlLine]] = {
        "Penstock": [line for cell, line in lines.items() if (cell.task, cell.objective) == (ADDITION, OWN_LOSS)],
        "TRL, code": [line for cell, line in trl.items() if cell.task == ADDITION],
    }
    rows = [
        f"| Trainer | seeds | {' | '.join(LEARNED)} | steps to {GOAL:g} held out | CPU s |",
        "| --- | --- |" + " --- |" * len(LEARNED) + " --- | --- |",
    ]
    for name, found in sides.items():
        if not found:
            rows.append(f"| {name} | 0 of {len(SEEDS)} | {NOT_MEASURED} |" + " |" * (len(LEARNED) + 1))
            continue
        entries = " | ".join(spread(map(column, found)) for column in LEARNED.values())
        goals = [_steps_to_goal(line) for line in found]
        steps = spread(goals, 0) if max(goals) < math.inf else "not by all"
        cpu = spread([line.cpu_seconds for line in found], 0)
        rows.append(f"| {name} | {len(found)} of {len(SEEDS)} | {entries} | {steps} | {cpu} |")
    versions = _all(", ".join(f"{name} {of}" for name, of in line.versions.items()) for line in trl.values())
    return "\n".join(rows) + (f"\n\nTRL's runs: {versions}." if versions else "")


def _steps_to_goal(line: LaunchedLine | TrlLine) -> float:
    return next((float(steps) for steps, accuracy in line.held_out if accuracy >= GOAL), math.inf)


def lags(lines: Lines) -> str:
    """One row an objective and a bound of the study's second task."""
    rows = [
        "| Objective | `max_staleness` | seeds | mean lag | held out after | reward, last steps "
        "| effective sample size, lowest | KL to the sampler, highest |",
        "| --- | ---: | --- | --- | --- | --- | --- | --- |",
    ]
    wanted = list(lags_grid())
    for objective in LAGS_OBJECTIVES:
        for lag in LAGS_LAUNCHED:
            cells = [cell for cell in wanted if (cell.objective, cell.lag) == (objective, lag)]
            found = [lines[cell] for cell in cells if cell in lines]
            start = f"| {objective} | {lag} | {len(found)} of {len(cells)} |"
            if not found:
                rows.append(f"{start} {NOT_MEASURED} | | | | |")
                continue
            entries = [
                spread(line.mean_lag for line in found),
                *(spread(map(LEARNED[name], found)) for name in ("held out after", "reward, last steps")),
                spread(min(_finite(line.effective_sample_size)) for line in found),
                spread((max(_finite(line.behaviour_kl)) for line in found), 3),
            ]
            rows.append(f"{start} {' | '.join(entries)} |")
    return "\n".join(rows)


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


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
    wanted = [*launched_grid(), *lags_grid()]
    measured = [lines[cell] for cell in wanted if cell in lines]
    if not measured:
        return f"0 of {len(wanted)} runs are measured."
    beside = sum(line.beside_other_work for line in measured)
    return (
        f"{len(measured)} of {len(wanted)} runs are measured, {beside} of them beside other work on the same cores, on "
        f"{_all(line.machine for line in measured)}, with "
        f"{_all(', '.join(f'{name} {of}' for name, of in line.versions.items()) for line in measured)}."
    )


def spread(values: Iterable[float], digits: int = 2) -> str:
    """The mean, and the range of more than one value.

    >>> spread([0.5, 1.0]), spread([0.25])
    ('0.75 (0.50 to 1.00)', '0.25')
    """
    found: Sequence[float] = list(values)
    mean = f"{float(np.mean(found)):.{digits}f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.{digits}f} to {max(found):.{digits}f})"


def _all(texts: Iterable[str]) -> str:
    return "; ".join(sorted(set(texts)))

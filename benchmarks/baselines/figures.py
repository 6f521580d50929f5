"""The pictures of the page, as SVG whose bytes depend on the raw lines alone."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.baselines.cells import LAGS, LAGS_LAUNCHED, LAGS_OBJECTIVES, Cell
from benchmarks.baselines.launched.tasks import OWN_LOSS, TASKS
from benchmarks.baselines.lines import LaunchedLine, Line, TrlLine
from benchmarks.baselines.objectives import OBJECTIVES
from benchmarks.baselines.scores import final_score

COLUMNS = 4


def draw_learning(lines: Mapping[Cell, LaunchedLine], trl: Mapping[Cell, TrlLine]) -> bytes:
    """One panel a launched task: the reward of each step, a line a seed, and held-out accuracy, a dot an evaluation."""
    runs: dict[str, list[LaunchedLine | TrlLine]] = {}
    for name in TASKS:
        runs[name] = [line for cell, line in lines.items() if (cell.task, cell.objective) == (name, OWN_LOSS)]
        runs[f"{name}, TRL"] = [line for cell, line in trl.items() if cell.task == name]
    names = [name for name, found in runs.items() if found] or list(TASKS)[:1]
    figure, panels = _panels(len(names), share=False)
    for axes, name in zip(panels, names, strict=True):
        for line in runs[name]:
            (drawn,) = axes.plot(line.reward, linewidth=0.8, alpha=0.6)
            steps, accuracies = zip(*line.held_out, strict=True) if line.held_out else ((), ())
            axes.plot(steps, accuracies, "o-", ms=3, linewidth=0.8, color=drawn.get_color())
        axes.set_title(name)
    _label(panels, "step", "reward; dots: held out")
    return _svg(figure)


def draw_lags(lines: Mapping[Cell, LaunchedLine]) -> bytes:
    """The launched cells of the study, one panel an objective: a line a lag, the mean reward of its runs."""
    figure, panels = _panels(len(LAGS_OBJECTIVES))
    for axes, objective in zip(panels, LAGS_OBJECTIVES, strict=True):
        _draw_mean_rewards(axes, lines, objective, LAGS_LAUNCHED)
    _label(panels, "step", "reward of the batch")
    _legend(panels)
    return _svg(figure)


def draw_scores(lines: Mapping[Cell, Line]) -> bytes:
    """Final score over lag, one panel an objective: a dot a run, a line through the means."""
    figure, panels = _panels(len(OBJECTIVES))
    for axes, objective in zip(panels, OBJECTIVES, strict=True):
        runs = [line for line in lines.values() if line.cell.objective == objective]
        axes.plot(
            [LAGS.index(line.cell.lag) for line in runs], [final_score(line) for line in runs], "o", ms=3, alpha=0.5
        )
        means = {lag: [final_score(line) for line in runs if line.cell.lag == lag] for lag in LAGS}
        there = [lag for lag in LAGS if means[lag]]
        axes.plot([LAGS.index(lag) for lag in there], [float(np.mean(means[lag])) for lag in there], "-")
        axes.set_xticks(range(len(LAGS)), [str(lag) for lag in LAGS])
        axes.set_title(objective)
    _label(panels, "lag", "held-out accuracy")
    return _svg(figure)


def draw_curves(lines: Mapping[Cell, Line]) -> bytes:
    """Training reward over steps, one panel an objective: a line a lag, the mean of its runs."""
    figure, panels = _panels(len(OBJECTIVES))
    for axes, objective in zip(panels, OBJECTIVES, strict=True):
        _draw_mean_rewards(axes, lines, objective, LAGS)
    _label(panels, "step", "reward of the batch")
    _legend(panels)
    return _svg(figure)


def _draw_mean_rewards(
    axes: Axes, lines: Mapping[Cell, Line] | Mapping[Cell, LaunchedLine], objective: str, lags: Sequence[int]
) -> None:
    for lag in lags:
        runs = [line for cell, line in lines.items() if (cell.objective, cell.lag) == (objective, lag)]
        if runs:
            axes.plot(np.mean([line.reward for line in runs], axis=0), label=f"lag {lag}", linewidth=1)
    axes.set_title(objective)


def _legend(panels: Sequence[Axes]) -> None:
    with_curves = [axes for axes in panels if axes.get_legend_handles_labels()[0]]
    if with_curves:
        with_curves[0].legend(frameon=False, fontsize=7, loc="upper center")  # "best" is slow


def _panels(count: int, *, share: bool = True) -> tuple[Figure, Sequence[Axes]]:
    matplotlib.rc("svg", fonttype="none", hashsalt="penstock")
    matplotlib.rc("font", size=9)
    matplotlib.rc("axes.spines", top=False)
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.4 * columns, 2.0 * rows), layout="constrained")
    grid = list(np.ravel(figure.subplots(rows, columns, sharex=share, sharey=True, squeeze=False)))
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def _label(panels: Sequence[Axes], x: str, y: str) -> None:
    for index, axes in enumerate(panels):
        axes.set_ylim(0, 1.02)
        if index >= len(panels) - COLUMNS:
            axes.set_xlabel(x)
        if index % COLUMNS == 0:
            axes.set_ylabel(y)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()

"""The runs that are measured: one cell of a grid each, a task, an objective, a lag and a seed.

Owns the grids, and the order in which they are filled: what one seed needs comes first, so that a grid that is not
finished is still a comparison.
"""

from collections.abc import Iterator

import msgspec

from benchmarks.baselines.launched.tasks import OWN_LOSS, TASKS
from benchmarks.baselines.objectives import OBJECTIVES

LAGS = (0, 1, 2, 4, 8)
SEEDS = (1, 2, 3, 4, 5)
LEARNING_RATE = 1e-4
NUM_STEPS = 60
STUDY = "sorting"
ADDITION = "addition"
LAGS_OBJECTIVES = ("ppo", "decoupled, approximated")
LAGS_LAUNCHED = (0, 2, 8)


class Cell(msgspec.Struct, frozen=True, omit_defaults=True):
    """One run.

    objective: one of the study's, or the task's own loss. lag: of the study, the versions that every token is trained
    late; of a launched task, `staleness.max_staleness`.
    """

    objective: str
    lag: int
    seed: int
    task: str = STUDY

    def __str__(self) -> str:
        return f"{self.task}, {self.objective}, lag {self.lag}, seed {self.seed}"


def grid() -> Iterator[Cell]:
    """All cells of the study."""
    for seed in SEEDS:
        for objective in OBJECTIVES:
            for lag in LAGS:
                yield Cell(objective, lag, seed)


def launched_grid() -> Iterator[Cell]:
    """All cells of the launched tasks: each task as its example has it, five seeds unless it says fewer."""
    for name, task in TASKS.items():
        for seed in SEEDS[: task.num_seeds]:
            yield Cell(OWN_LOSS, task.lag, seed, name)


def lags_grid() -> Iterator[Cell]:
    """All cells of the study's second task: two of its objectives at three bounds, by services and a language model."""
    for seed in SEEDS:
        for lag in LAGS_LAUNCHED:
            for objective in LAGS_OBJECTIVES:
                yield Cell(objective, lag, seed, ADDITION)

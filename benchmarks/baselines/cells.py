"""The runs that are measured: one cell of the grid each.

Owns the grid, and the order in which it is filled: all objectives and lags of the first seed come first, so that a grid
that is not finished is still a comparison.
"""

from collections.abc import Iterator

import msgspec

from benchmarks.baselines.objectives import OBJECTIVES

LAGS = (0, 1, 2, 4, 8)
SEEDS = (1, 2, 3, 4, 5)
LEARNING_RATE = 1e-4
NUM_STEPS = 60


class Cell(msgspec.Struct, frozen=True):
    """One run of the sorting task. lag: versions that every token is trained late."""

    objective: str
    lag: int
    seed: int


def grid() -> Iterator[Cell]:
    """All cells of the study."""
    for seed in SEEDS:
        for objective in OBJECTIVES:
            for lag in LAGS:
                yield Cell(objective, lag, seed)

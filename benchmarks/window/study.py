"""What lag costs an objective, by the raw lines of the study of staleness (docs/baselines.md).

Owns the relation of lag to effective sample size and KL. A lag between two measured ones is a mix of both.
"""

import random
import statistics
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from benchmarks.baselines.cells import LAGS, STUDY
from benchmarks.baselines.lines import Line, read_lines
from benchmarks.window.controller import Signs

LINES = Path(__file__).parent.parent.parent / "docs" / "baselines" / f"{STUDY}.jsonl"


@cache
def measured() -> tuple[Line, ...]:
    """All runs of the study."""
    return tuple(read_lines(LINES, Line).values())


def present(values: Iterable[float | None]) -> list[float]:
    """Without the steps that have no value."""
    return [value for value in values if value is not None]


class Study:
    """The measured steps of one objective."""

    def __init__(self, objective: str) -> None:
        self._steps: dict[int, list[tuple[float, float]]] = {lag: [] for lag in LAGS}
        for line in measured():
            if line.cell.objective == objective:
                pairs = zip(present(line.effective_sample_size), present(line.behaviour_kl), strict=True)
                self._steps[line.cell.lag] += pairs
        self._mean_sizes = {lag: statistics.fmean(size for size, _ in steps) for lag, steps in self._steps.items()}
        self._median_sizes = {lag: statistics.median(size for size, _ in steps) for lag, steps in self._steps.items()}
        self._median_kls = {lag: statistics.median(kl for _, kl in steps) for lag, steps in self._steps.items()}

    def sample(self, lag: float, rng: random.Random) -> tuple[float, float]:
        """Effective sample size and KL of one measured step with this lag, in versions."""
        low, high, share = _neighbours(lag)
        return rng.choice(self._steps[high if rng.random() < share else low])

    def mean_size(self, lags: Sequence[float]) -> float:
        """Effective sample size that is to be expected of steps with these lags."""
        return _mean_at(lags, self._mean_sizes)

    def allows(self, lags: Sequence[float], signs: Signs) -> bool:
        """Whether neither sign, by its medians, lowers the bound of steps with these lags."""
        too_small = _mean_at(lags, self._median_sizes) < signs.low_size
        return not too_small and _mean_at(lags, self._median_kls) <= signs.high_kl


def _mean_at(lags: Sequence[float], by_lag: dict[int, float]) -> float:
    mixes = (_neighbours(lag) for lag in lags)
    return statistics.fmean((1 - share) * by_lag[low] + share * by_lag[high] for low, high, share in mixes)


def _neighbours(lag: float) -> tuple[int, int, float]:
    """The measured lags below and above, and the share of the one above."""
    lag = min(max(lag, LAGS[0]), LAGS[-1])
    low = max(each for each in LAGS if each <= lag)
    high = min(each for each in LAGS if each >= lag)
    return low, high, (lag - low) / (high - low) if high > low else 0.0

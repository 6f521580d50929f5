"""Curves of few points, as an instrument draws them: a mean, and the band between the lowest and the highest value.

Pure. Values that are not finite are no points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """x ascending. low, high: the extremes of the values that a point stands for; equal to y where it is one value."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


def curve(x: Sequence[float], y: Sequence[float], most: int) -> Curve:
    """At most `most` points: each the mean of equally many neighbours.

    >>> curve([0.0, 1.0, 2.0, 3.0], [1.0, 3.0, float("nan"), 5.0], 2)
    Curve(x=[0.5, 3.0], y=[2.0, 5.0], low=[1.0, 5.0], high=[3.0, 5.0])
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
    width = max(1, math.ceil(len(points) / most))
    parts = [points[start : start + width] for start in range(0, len(points), width)]
    return Curve(
        x=[_mean([a for a, _ in part]) for part in parts],
        y=[_mean([b for _, b in part]) for part in parts],
        low=[min(b for _, b in part) for part in parts],
        high=[max(b for _, b in part) for part in parts],
    )


def _mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else math.fsum(values) / len(values)

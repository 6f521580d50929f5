"""A staleness bound that moves: up by one while the trainer waits and the signs allow it, down by one if they do not.

Owns the bound. Invariant: after a move it stays until steps that were issued under it are trained; it lowers the bound
by the first medians that are bad after that.
"""

import statistics
from collections import deque
from dataclasses import dataclass

WINDOW = 5  # steps whose medians count
WAITS = 0.05  # share of a step: less is no reason to raise the bound


@dataclass(frozen=True)
class Signs:
    """What lowers the bound, and what allows to raise it: effective sample size, and KL in nats a token."""

    low_size: float
    high_kl: float
    enough_size: float
    low_kl: float


SIGNS = {
    "as in baselines.md": Signs(low_size=0.4, high_kl=0.15, enough_size=0.5, low_kl=0.1),
    "looser": Signs(low_size=0.3, high_kl=0.3, enough_size=0.4, low_kl=0.2),
}


class Controller:
    """The bound of one run, from `first`, between 0 and `largest`."""

    def __init__(self, signs: Signs, first: int, largest: int) -> None:
        self.bound = first
        self._signs, self._largest = signs, largest
        self._seen: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)
        self._unseen = 0

    def step(self, waited_share: float, size: float, kl: float) -> None:
        """After a step: share of its time in which it waited for its batch, effective sample size, KL."""
        if self._unseen:
            self._unseen -= 1
            return
        self._seen.append((waited_share, size, kl))
        if len(self._seen) < WINDOW:
            return
        waited_share, size, kl = (statistics.median(column) for column in zip(*self._seen, strict=True))
        if size < self._signs.low_size or kl > self._signs.high_kl:
            self._move(max(0, self.bound - 1))
        elif waited_share > WAITS and size > self._signs.enough_size and kl < self._signs.low_kl:
            self._move(min(self._largest, self.bound + 1))

    def _move(self, bound: int) -> None:
        if bound != self.bound:
            self._unseen = max(bound, self.bound)
            self.bound = bound
            self._seen.clear()

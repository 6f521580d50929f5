"""Whole numbers by index, and the index at a place within their sum.

Owns a Fenwick tree. Invariant: sums are exact, so that they do not depend on the order of changes.
"""

from array import array
from collections.abc import Iterable


class WeightTree:
    """Weights of prompts: a change and a search cost the logarithm of their number.

    >>> tree = WeightTree([3, 0, 2])
    >>> tree.total, [tree.find(place) for place in range(5)]
    (5, [0, 0, 0, 2, 2])
    >>> tree.set(0, 1); tree.total, tree.find(1)
    (3, 2)
    """

    def __init__(self, weights: Iterable[int]) -> None:
        self._weights = array("q", weights)
        self._sums = array("q", [0, *self._weights])
        for index in range(1, len(self._sums)):
            above = index + (index & -index)
            if above < len(self._sums):
                self._sums[above] += self._sums[index]
        self.total = sum(self._weights)

    def __getitem__(self, index: int) -> int:
        return self._weights[index]

    def set(self, index: int, weight: int) -> None:
        """Change one weight."""
        change = weight - self._weights[index]
        self._weights[index] = weight
        self.total += change
        index += 1
        while index < len(self._sums):
            self._sums[index] += change
            index += index & -index

    def find(self, place: int) -> int:
        """The index whose weight covers `place`, 0 <= place < total: each as likely as its weight, for a random one."""
        index, step = 0, 1 << len(self._weights).bit_length()
        while step:
            beyond = index + step
            if beyond < len(self._sums) and self._sums[beyond] <= place:
                index = beyond
                place -= self._sums[beyond]
            step >>= 1
        return index

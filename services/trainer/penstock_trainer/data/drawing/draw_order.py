"""The order in which a run draws its prompts: ticket number -> set and row.

Owns the order. Invariants: it is a function of the seed, the sizes of the sets, their weights and the number alone; and
every N draws, an epoch, give each set its share of them, where N is the number of prompts of all sets. A set visits all
its prompts before any of them again, so without weights an epoch visits every prompt once.

    places    permutation(seed, epoch) of N places: the first c_1 are of the first set, the next c_2 of the second, ...
    row       the place's number within its set, plus c_i for each epoch before, counts the set's draws: draw k of a set
              of n prompts takes number k mod n in the order of its pass k // n

With one set, the place in the epoch's permutation is the row. Without shuffling, both orders are those of the rows: the
draws of each set are spread evenly over the epoch, and each pass begins with its first row.
"""

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm

from penstock.errors import ConfigError
from penstock.seeds import set_seed
from penstock_trainer.data.drawing.large_permutation import indices, large_permutation

EPOCHS_KEPT = 2


@dataclass(frozen=True)
class DrawnSet:
    """A set of prompts: its name ("" for the only one), its number of prompts, and its weight if it has one."""

    name: str
    size: int
    weight: float | None = None


class DrawOrder:
    """The order of one run.

    >>> order = DrawOrder(3, [DrawnSet("easy", 2), DrawnSet("hard", 4)])
    >>> [order.set_of(number) for number in range(6)].count(0), sorted(order.row(number) for number in range(6))
    (2, [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, seed: int, sets: Sequence[DrawnSet], *, shuffle: bool = True) -> None:
        """ConfigError if a set's weight gives it no draw of an epoch."""
        self._seed = seed
        self._shuffle = shuffle
        self.sets = tuple(sets)
        self._counts = draws_of_an_epoch(sets)
        self._ends = list(accumulate(self._counts))
        self._starts = [0, *accumulate(each.size for each in sets)]
        self._places: dict[int, array[int]] = {}
        """Of the last epochs: at the end of one, tickets of the next are issued while those before are trained."""
        self._passes: dict[tuple[int, int], Sequence[int]] = {}

    @property
    def length(self) -> int:
        """Draws of an epoch: the prompts of all sets."""
        return self._starts[-1]

    @property
    def described(self) -> str:
        """What of it the prompts and the seed do not fix, in words; "" for one set in shuffled order."""
        parts = [f"{each.name} {each.size} prompts" + _weight_text(each) for each in self.sets if each.name]
        sets = f"sets: {', '.join(parts)}" if len(self.sets) > 1 else ""
        return "; ".join(filter(None, [sets, "" if self._shuffle else "in the order of the rows"]))

    def set_of(self, number: int) -> int:
        """The set that a draw takes its prompt from."""
        if len(self.sets) == 1:
            return 0
        epoch, position = divmod(number, self.length)
        return bisect_right(self._ends, self._places_of(epoch)[position])

    def row(self, number: int) -> int:
        """The prompt of a draw, counted over all sets in their order."""
        epoch, position = divmod(number, self.length)
        place = self._places_of(epoch)[position]
        if len(self.sets) == 1:
            return place
        chosen = bisect_right(self._ends, place)
        count, size = self._counts[chosen], self.sets[chosen].size
        begun, within = divmod(epoch * count + place - (self._ends[chosen] - count), size)
        return self._starts[chosen] + self._pass(chosen, begun)[within]

    def set_with(self, row: int) -> int:
        """The set of a prompt."""
        return bisect_right(self._starts, row) - 1

    def rows_of(self, chosen: int) -> range:
        """The prompts of a set, counted over all sets."""
        return range(self._starts[chosen], self._starts[chosen + 1])

    def _places_of(self, epoch: int) -> "array[int]":
        if not self._shuffle:
            epoch = 0  # all are alike
        if epoch not in self._places:
            if len(self._places) == EPOCHS_KEPT:
                del self._places[next(iter(self._places))]
                self._passes.clear()
            shuffled = self._shuffle
            self._places[epoch] = (
                large_permutation(self._seed, epoch, self.length) if shuffled else evenly_mixed(self._counts)
            )
        return self._places[epoch]

    def _pass(self, chosen: int, number: int) -> Sequence[int]:
        """The order in which a set visits its prompts for the `number`-th time."""
        if not self._shuffle:
            return range(self.sets[chosen].size)
        key = (chosen, number)
        if key not in self._passes:
            self._passes[key] = large_permutation(set_seed(self._seed, chosen), number, self.sets[chosen].size)
        return self._passes[key]


def evenly_mixed(counts: Sequence[int]) -> "array[int]":
    """The places of an epoch in an order that keeps that of each set, and spreads each over all of it.

    Draw k of a set with c draws comes at (2 k + 1) / (2 c) of the epoch; at the same point the earlier set comes first.
    In the memory of the result.

    >>> list(evenly_mixed([2, 4]))
    [2, 0, 3, 4, 1, 5]
    """
    if len(counts) == 1:
        return indices(counts[0])
    epoch = lcm(*(2 * count for count in counts))  # in which all these points are whole numbers

    def points(start: int, count: int) -> Iterator[tuple[int, int]]:
        apart = epoch // (2 * count)
        return (((2 * k + 1) * apart, start + k) for k in range(count))

    starts = [0, *accumulate(counts)]
    mixed = indices(0, most=starts[-1])
    mixed.extend(place for _, place in heapq.merge(*map(points, starts, counts)))
    return mixed


def draws_of_an_epoch(sets: Sequence[DrawnSet]) -> list[int]:
    """How many draws of an epoch each set gets: in all as many as there are prompts, shared by the largest remainder.

    >>> draws_of_an_epoch([DrawnSet("a", 2, 1.0), DrawnSet("b", 5, 2.0)])
    [2, 5]
    """
    weights = [Fraction(each.size if each.weight is None else each.weight) for each in sets]
    length, total = sum(each.size for each in sets), sum(weights)
    exact = [length * weight / total for weight in weights]
    counts = [int(each) for each in exact]
    by_remainder = sorted(range(len(sets)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: length - sum(counts)]:
        counts[index] += 1
    for each, count in zip(sets, counts, strict=True):
        if not count:
            raise ConfigError(
                f"data.train_sets.{each.name}.weight is {each.weight:g}, which is no draw of the {length} of an epoch: "
                "expected at least one; raise it, or leave the set out"
            )
    return counts


def sets_of(sizes: Mapping[str, int], weights: Mapping[str, float | None]) -> list[DrawnSet]:
    """The sets of prompts by their names and sizes, in their order."""
    return [DrawnSet(name, size, weights.get(name)) for name, size in sizes.items()]


def _weight_text(each: DrawnSet) -> str:
    return "" if each.weight is None else f" of weight {each.weight!r}"

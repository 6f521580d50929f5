"""The tree in which servers pass a version on: who gets it from whom.

Owns the order of the servers and what is remembered of their faults. Invariant: the parents of a server are its
ancestors in the tree, the nearest first and the trainer last: no two servers wait for each other, whichever parents
they leave. Pure.

    fan_out 2, with a slow server s           trainer
                                             /       \\
                                            a         b
                                           / \\       / \\
                                          c   d     e   s

A server that was gone or slow has no children for `LEAF_PUSHES` pushes; one that sent wrong bytes has none any more.
"""

from collections.abc import Iterable, Sequence

from penstock.contracts.services import ServiceRecord
from penstock.contracts.weight_sources import LeftParent, Parent

LEAF_PUSHES = 10


class RelayTree:
    """The trees of one trainer, one for each push."""

    def __init__(self, fan_out: int, trainer: Parent) -> None:
        """`fan_out`: children of each; `trainer`: the root."""
        self._fan_out = fan_out
        self._trainer = trainer
        self._parents: dict[str, tuple[Parent, ...]] = {}
        self._leaf_pushes: dict[str, int] = {}
        self._wrong: set[str] = set()

    def plan(self, servers: Sequence[ServiceRecord]) -> list[ServiceRecord]:
        """Plan the next push; the servers in an order in which each comes after its parents."""
        self._leaf_pushes = {name: left - 1 for name, left in self._leaf_pushes.items() if left > 1}
        leaves = self._leaf_pushes.keys() | self._wrong
        relays = [each for each in servers if each.name not in leaves]
        ordered = [*relays, *(each for each in servers if each.name in leaves)]
        self._parents = {}
        for number, server in enumerate(ordered):
            parent = number // self._fan_out - 1
            if parent < 0 or not relays:
                self._parents[server.name] = (self._trainer,)
            else:
                above = ordered[parent % len(relays)]  # with too many leaves some parents have more children
                self._parents[server.name] = (Parent(above.name, above.url), *self._parents[above.name])
        return ordered

    def parents_of(self, server: ServiceRecord) -> tuple[Parent, ...]:
        """Those that a server is to ask, in this order. KeyError: it is not in the plan."""
        return self._parents[server.name]

    def note(self, left: Iterable[LeftParent]) -> None:
        """Remember which parents were left in a push."""
        for each in left:
            if each.name == self._trainer.name:
                continue
            if each.reason == "wrong":
                self._wrong.add(each.name)
            else:
                self._leaf_pushes[each.name] = LEAF_PUSHES + 1

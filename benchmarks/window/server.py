"""Servers that decode their completions together, the faster the fewer there are.

Owns which completions run where. Invariant: all completions of a server decode at one rate, and its `work` is the
length that each of them has gained since the server was empty.
"""

import heapq
from collections.abc import Iterable

from benchmarks.window.lengths import GROUP_SIZE

SLOTS = 2  # groups that a server holds
SPEED_UP = 2.0  # a completion alone on a server against one on a full server


class Server:
    """One server: `advance` to the present before each change."""

    def __init__(self) -> None:
        self.num_groups = 0
        self.stamp = 0
        """Of the last change: an end that was foreseen before it does not hold any more."""
        self._ends: list[tuple[float, int]] = []
        self._work = self._since = 0.0

    @property
    def _rate(self) -> float:
        return SPEED_UP / (1 + (SPEED_UP - 1) * len(self._ends) / (SLOTS * GROUP_SIZE))

    @property
    def next_end(self) -> float | None:
        """When its next completion ends, if nothing changes; None without any."""
        if not self._ends:
            return None
        return self._since + max(0.0, self._ends[0][0] - self._work) / self._rate

    def advance(self, now: float) -> None:
        """Let time pass."""
        self._work += (now - self._since) * self._rate
        self._since = now
        self.stamp += 1

    def add(self, ticket: int, lengths: Iterable[float]) -> None:
        """Start the completions of a ticket."""
        self.num_groups += 1
        for length in lengths:
            heapq.heappush(self._ends, (self._work + length, ticket))

    def pop(self) -> int:
        """The next completion ends; its ticket."""
        return heapq.heappop(self._ends)[1]


class Servers:
    """All of them; the emptiest takes the next ticket."""

    def __init__(self, num_servers: int) -> None:
        self._servers = [Server() for _ in range(num_servers)]
        self._by_load: list[list[int]] = [list(range(num_servers)), *([] for _ in range(SLOTS))]

    def __getitem__(self, index: int) -> Server:
        return self._servers[index]

    def take(self) -> int | None:
        """The emptiest one, which a group is added to; None if all are full."""
        for load, indices in enumerate(self._by_load[:-1]):
            if indices:
                index = indices.pop()
                self._by_load[load + 1].append(index)
                return index
        return None

    def leave(self, index: int) -> None:
        """A group of this server has ended."""
        server = self._servers[index]
        self._by_load[server.num_groups].remove(index)
        server.num_groups -= 1
        self._by_load[server.num_groups].append(index)

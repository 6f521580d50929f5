"""The groups that run on one engine, and whether another fits.

Owns the count of completions. Invariants: running groups and those being taken have at most `max_completions` together,
unless one group alone is larger; while a group runs alone no other one starts.
"""

import asyncio
import contextlib
from collections.abc import Iterator

from penstock.broker import Stage
from penstock.contracts import Ticket

ISOLATION_DEATHS = 2  # a ticket with so many engine deaths runs alone


class Running:
    """What runs on one engine."""

    def __init__(self, group_size: int, max_completions: int, max_eval_completions: int) -> None:
        """`max_eval_completions`: of evaluation, while training tickets wait."""
        self._group_size = group_size
        self._max_completions = max_completions
        self._max_eval_completions = max_eval_completions
        self._groups: dict[asyncio.Task[None], tuple[Stage, int]] = {}
        self._num_coming = 0
        self.isolated: asyncio.Task[None] | None = None
        """The one that runs alone, or waits until it does."""

    @property
    def tasks(self) -> tuple[asyncio.Task[None], ...]:
        return tuple(self._groups)

    @property
    def is_full(self) -> bool:
        """Whether another group has to wait for one of `tasks`."""
        return bool(self._groups) and not self.has_room

    @property
    def has_room(self) -> bool:
        """Whether another group fits beside all that run and come."""
        return self._num_running() + self._num_coming + self._group_size <= self._max_completions

    def add(self, task: asyncio.Task[None], stage: Stage, num_completions: int, *, alone: bool = False) -> None:
        """A group that runs until its task ends."""
        self._groups[task] = (stage, num_completions)
        if alone:
            self.isolated = task
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._groups[task]
        if task is self.isolated:
            self.isolated = None

    @contextlib.contextmanager
    def coming(self, leaving: Ticket | None = None) -> Iterator[None]:
        """Surrounds taking a ticket, in place of `leaving` if given, so that two do not both get the last room."""
        num_completions = self._group_size - (0 if leaving is None else len(leaving.seeds))
        self._num_coming += num_completions
        try:
            yield
        finally:
            self._num_coming -= num_completions

    def order(self, leaving: Ticket | None = None) -> tuple[Stage, ...]:
        """Evaluation first while it is below its share, so that training cannot keep it away for ever."""
        num_eval = self._num_running(Stage.EVAL)
        if leaving is not None and leaving.purpose == "eval":
            num_eval -= len(leaving.seeds)
        share_left = num_eval + self._group_size <= self._max_eval_completions
        return (Stage.EVAL, Stage.TICKETS) if share_left else (Stage.TICKETS, Stage.EVAL)

    def may_replace(self, leaving: Ticket) -> bool:
        """Whether another group fits in the place of one whose generation has ended."""
        others = self._num_running() + self._num_coming - len(leaving.seeds)
        return self.isolated is None and (not others or others + self._group_size <= self._max_completions)

    def _num_running(self, stage: Stage | None = None) -> int:
        return sum(number for kind, number in self._groups.values() if stage in (None, kind))

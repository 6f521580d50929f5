"""How many episodes run at once, and which tickets are taken.

Owns the count. Invariants: at most `max_episodes` episodes run; a ticket is taken only if its whole group can run at
once, or nothing else does: then a group that is larger runs in waves.
"""

import asyncio
from dataclasses import dataclass

from penstock.broker import Stage


class Room:
    """The room of one service."""

    def __init__(self, group_size: int, max_episodes: int, max_eval_episodes: int) -> None:
        """`max_eval_episodes`: of evaluation, while training tickets wait."""
        self.running = asyncio.Semaphore(max_episodes)
        """Held by each running episode."""
        self._group_size = group_size
        self._max_episodes = max_episodes
        self._max_eval_episodes = max_eval_episodes
        self._num_due: dict[Stage, int] = dict.fromkeys(Stage, 0)
        self._changed = asyncio.Event()

    @property
    def is_full(self) -> bool:
        """Whether another group has to wait."""
        num_due = sum(self._num_due.values())
        return bool(num_due) and num_due + self._group_size > self._max_episodes

    async def room(self) -> None:
        """Return when another group fits."""
        while self.is_full:
            self._changed.clear()
            await self._changed.wait()

    def order(self) -> tuple[Stage, ...]:
        """Evaluation first while it is below its share, so that training cannot keep it away for ever."""
        has_share = self._num_due[Stage.EVAL] + self._group_size <= self._max_eval_episodes
        return (Stage.EVAL, Stage.TICKETS) if has_share else (Stage.TICKETS, Stage.EVAL)

    def enter(self, stage: Stage, num_episodes: int) -> "Due":
        """A group that was taken."""
        due = Due(self, stage)
        due.change(num_episodes)
        return due

    def change(self, stage: Stage, change: int) -> None:
        self._num_due[stage] += change
        self._changed.set()


@dataclass
class Due:
    """The episodes of one group that have not ended."""

    room: Room
    stage: Stage
    number: int = 0

    def change(self, change: int) -> None:
        """So many more episodes are due; negative: so many have ended."""
        self.number += change
        self.room.change(self.stage, change)

    def all_ended(self) -> None:
        self.change(-self.number)

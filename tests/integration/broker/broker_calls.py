"""Hand-overs whose call to the server is disturbed on its way.

Owns the part of such a call that reaches the server.
"""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Any

from penstock.broker import Queue
from penstock.broker.calls import Calls, Command
from penstock.broker.scripts import ScriptCall
from penstock.broker.worker import HAND_OVER


class Fate(Enum):
    """The fate of one hand-over."""

    ANSWER_LOST = auto()
    """It runs, its connection breaks before the answer, and it is repeated."""
    DIES = auto()
    """Its worker dies after the parts are written and before the script."""
    PARTS_EXPIRE = auto()
    """The server is away so long after the parts are written that the script finds none."""


class DiedError(Exception):
    """The worker has died."""


class FatefulCalls(Calls):
    """`fate`: the fate of the next hand-over."""

    fate: Fate | None = None

    async def run(self, call: ScriptCall, first: Sequence[Command] = ()) -> Any:
        if call.script is not HAND_OVER or self.fate is None:
            return await super().run(call, first)
        fate, self.fate = self.fate, None
        if fate is Fate.ANSWER_LOST:
            await super().run(call, first)
            return await super().run(call, first)
        for command in first:
            await self.read(*command)
        if fate is Fate.DIES:
            raise DiedError
        for _, key, *_ in first:
            await self.read("DEL", key)
        return await super().run(call)


async def with_fates(queue: Queue) -> FatefulCalls:
    """Let the worker's hand-overs be disturbed from now on."""
    await queue._calls.close()
    queue._calls = calls = FatefulCalls(queue.client)
    return calls

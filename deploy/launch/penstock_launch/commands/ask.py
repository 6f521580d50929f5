"""One question to the queue of a run, for commands that look at it from outside.

Owns the connection for as long as the question takes; nothing is made there for a run that it does not know.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from penstock.broker import Queue, connect
from penstock.broker.trainer import read_ledger
from penstock.config import Config
from penstock.contracts.ledger import LedgerState, replay
from penstock_launch.commands.status import reachable

T = TypeVar("T")


def ask(config: Config, question: Callable[[Queue], Awaitable[T]]) -> T:
    """The queue's answer; NotRunningError, QueueError or ConfigError when the run cannot be asked."""

    async def connected() -> T:
        queue = await connect(reachable(config), known_only=True)
        try:
            return await question(queue)
        finally:
            await queue.close()

    return asyncio.run(connected())


def ask_ledger(config: Config) -> LedgerState:
    """The ledger as the queue holds it."""
    return replay(ask(config, read_ledger))

"""One query to the queue of a run, for commands that observe it from outside.

Owns the connection for the duration of the query; a query creates no keys for an unknown run.
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
    """The queue's answer; NotRunningError, QueueError or ConfigError if the run's queue cannot be reached."""

    async def connected() -> T:
        queue = await connect(reachable(config), known_only=True)
        try:
            return await question(queue)
        finally:
            await queue.close()

    return asyncio.run(connected())


def ask_ledger(config: Config) -> LedgerState:
    """The ledger in the queue."""
    return replay(ask(config, read_ledger))

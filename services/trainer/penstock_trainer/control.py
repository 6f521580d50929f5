"""Requests to the loop, from HTTP and from signals."""

import asyncio
from dataclasses import dataclass


async def first_of(*events: asyncio.Event) -> None:
    """Wait until any of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


@dataclass
class Requests:
    """Requests to the loop, from HTTP and from signals."""

    stop: asyncio.Event
    checkpoint: bool = False

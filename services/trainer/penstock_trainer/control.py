"""Requests to the loop, from HTTP and from signals."""

import asyncio
from dataclasses import dataclass


@dataclass
class Requests:
    """Requests to the loop, from HTTP and from signals."""

    stop: asyncio.Event
    checkpoint: bool = False

"""What HTTP and signals ask of the loop."""

import asyncio
from dataclasses import dataclass


@dataclass
class Requests:
    """What HTTP and signals ask of the loop."""

    stop: asyncio.Event
    checkpoint: bool = False

"""An event loop's clock that the test owns: no time passes but what the test lets pass."""

import asyncio

TURNS = 10
"""Of the loop after each moment: what became due runs, and what that woke."""


class OwnClock:
    """Stands in for the running loop's clock from its making on.

    Sockets and threads go on as ever; sleeps and timeouts end when the test moves the clock.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time()
        loop.time = lambda: self.now  # type: ignore[method-assign]

    async def advance(self, seconds: float, steps: int = 100) -> None:
        """Let so much time pass, a step after the other."""
        start = self.now
        for step in range(1, steps + 1):
            self.now = start + seconds * step / steps
            for _ in range(TURNS):
                await asyncio.sleep(0)

"""A clock for an event loop that moves only when the test moves it."""

import asyncio

TURNS = 10
"""Of the loop after each moment: what became due runs, and what that woke."""


class OwnClock:
    """Replaces the running loop's clock from its creation on.

    Sockets and threads work as usual; sleeps and timeouts end when the test moves the clock.
    """

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.now = loop.time()
        loop.time = lambda: self.now  # type: ignore[method-assign]

    async def advance(self, seconds: float, steps: int = 100) -> None:
        """Let this much time pass, in small steps."""
        start = self.now
        for step in range(1, steps + 1):
            self.now = start + seconds * step / steps
            for _ in range(TURNS):
                await asyncio.sleep(0)

"""Points at which the fake engine waits until the test lets it continue.

So an event in the middle of another does not depend on how long that one takes.
"""

import asyncio


class Gates:
    """The gates; all are open at first."""

    def __init__(self) -> None:
        self.holds_at = -1  # each completion waits before its token at this position
        self.num_held = 0  # how many have reached it
        self.num_aborts = 0  # aborts of all running requests; an abort ends the wait
        self.going_on = asyncio.Event()  # cleared while the engine is paused
        self.may_load, self.may_probe = asyncio.Event(), asyncio.Event()
        self.may_give_up, self.may_start = asyncio.Event(), asyncio.Event()
        self.open()

    def open(self) -> None:
        """Open all gates."""
        self.holds_at = -1
        for gate in (self.going_on, self.may_load, self.may_probe, self.may_give_up, self.may_start):
            gate.set()

    async def held(self, position: int, began_at: int) -> None:
        """Wait before the token at `position` of a completion that began after this many aborts."""
        self.num_held += position == self.holds_at
        while position == self.holds_at and self.num_aborts == began_at:  # noqa: ASYNC110 - of either
            await asyncio.sleep(0.005)

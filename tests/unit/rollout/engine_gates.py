"""Where the fake engine waits until a test has seen what it wants to see.

What is to happen in the middle of something is not left to how long that takes.
"""

import asyncio


class Gates:
    """All open at first."""

    def __init__(self) -> None:
        self.holds_at = -1  # completions wait before this token of theirs
        self.num_held = 0  # how many have come to that
        self.num_aborts = 0  # of all that runs; an abort ends the wait
        self.going_on = asyncio.Event()  # cleared while the engine is paused
        self.may_load, self.may_probe = asyncio.Event(), asyncio.Event()
        self.open()

    def open(self) -> None:
        """Let everything go on."""
        self.holds_at = -1
        for gate in (self.going_on, self.may_load, self.may_probe):
            gate.set()

    async def held(self, position: int, began_at: int) -> None:
        """Before the token at `position` of a completion that began after so many aborts."""
        self.num_held += position == self.holds_at
        while position == self.holds_at and self.num_aborts == began_at:  # noqa: ASYNC110 - of either
            await asyncio.sleep(0.005)

"""Counts requests or changes in flight, and waits until there is none."""

import asyncio
import contextlib
from collections.abc import Iterator


class InFlight:
    """Counts those that are inside `one`."""

    def __init__(self) -> None:
        self._number = 0
        self._none = asyncio.Event()
        self._none.set()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Around one of them."""
        self._number += 1
        self._none.clear()
        try:
            yield
        finally:
            self._number -= 1
            if not self._number:
                self._none.set()

    async def none(self) -> None:
        """Return once none is under way."""
        await self._none.wait()

    async def none_within(self, seconds: float) -> None:
        """Return once none is under way, or after `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.none()

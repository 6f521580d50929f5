"""Wakes coroutines when something has changed, from any thread."""

import asyncio
import threading
from collections.abc import Callable


class Bell:
    """Rung after each change of a state that coroutines wait for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """Let every waiting coroutine look again."""
        with self._lock:
            waiting, self._waiting = self._waiting, set()
        for future in waiting:
            future.get_loop().call_soon_threadsafe(_end, future)

    async def wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Return once `holds()`, or after `seconds`; whether it holds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            rung: asyncio.Future[None] = loop.create_future()
            with self._lock:
                self._waiting.add(rung)
            try:
                if holds():
                    return True
                async with asyncio.timeout_at(deadline):
                    await rung
            except TimeoutError:
                return holds()
            finally:
                with self._lock:
                    self._waiting.discard(rung)


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)

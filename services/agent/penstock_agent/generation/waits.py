"""How long something is waited for: by the calls of one episode, or by those that no server can answer."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Waits:
    """Waits that may overlap."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = 0.0
        self.num_waiting = 0
        self.since = clock()
        """When the first of them began; if there is none, when the last one ended."""

    @property
    def seconds(self) -> float:
        """For how long, in all, at least one was going on."""
        return self._seconds + (self._clock() - self.since if self.num_waiting else 0.0)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Surrounds a wait.

        >>> now = 10.0
        >>> waits = Waits(clock=lambda: now)
        >>> with waits.one():
        ...     now = 13.0
        ...     waits.num_waiting, waits.since, waits.seconds
        (1, 10.0, 3.0)
        >>> waits.num_waiting, waits.since, waits.seconds
        (0, 13.0, 3.0)
        """
        if not self.num_waiting:
            self.since = self._clock()
        self.num_waiting += 1
        try:
            yield
        finally:
            self.num_waiting -= 1
            if not self.num_waiting:
                now = self._clock()
                self._seconds += now - self.since
                self.since = now

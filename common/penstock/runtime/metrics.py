"""Metrics that prometheus_client does not have.

Owns the counter of seconds that is right at every moment: an activity of minutes shows while it runs, not in one jump
at its end.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class SecondsCounter(Collector):
    """Counts the seconds in which at least one of several activities runs, up to the moment of the read."""

    def __init__(
        self, name: str, text: str, *, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name = name
        self._text = text
        self._clock = clock
        self._num_running = 0
        self._running_since = 0.0
        self._ended_seconds = 0.0
        registry.register(self)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the `with` block runs."""
        if not self._num_running:
            self._running_since = self._clock()
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._ended_seconds += self._clock() - self._running_since

    @property
    def seconds(self) -> float:
        """The seconds so far."""
        running = self._clock() - self._running_since if self._num_running else 0.0
        return self._ended_seconds + running

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The one sample, for the registry."""
        yield CounterMetricFamily(self._name, self._text, value=self.seconds)

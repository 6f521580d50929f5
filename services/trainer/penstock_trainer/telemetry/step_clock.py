"""Seconds by phase of one step.

Invariant: no duration is negative, and none changes if the time of day is set or a server's clock is wrong: durations
are of the monotonic clock, the time of day only says when the step began.
"""

import time

from penstock_trainer.telemetry.records import PushTimes


class Clock:
    """Seconds by phase of one step, from the end of the one before."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self.seconds: dict[str, float] = {}
        self.pushes: tuple[PushTimes, ...] = ()
        """Pushes that ended while it ran."""
        self._began = self._last = time.monotonic()

    @property
    def elapsed_seconds(self) -> float:
        """Since the step began, without what was left out."""
        return time.monotonic() - self._began

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as `phase`."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def leave_out(self) -> None:
        """Count the time since the last lap for no step."""
        now = time.monotonic()
        self._begin_later(now - self._last)
        self._last = now

    def note(self, seconds: dict[str, float], pushes: tuple[PushTimes, ...] = ()) -> None:
        """Add seconds of work that ran in parallel to these phases, and when weights were pushed."""
        self.seconds.update(seconds)
        self.pushes += pushes

    def begin_at(self, started_at: float) -> None:
        """Drop the wait before Unix second `started_at` of a server: until then the servers were starting."""
        waited = self.seconds.get("wait", 0.0)
        early = min(max(0.0, started_at - self.started_at), waited)
        self._begin_later(early)
        self.seconds["wait"] = waited - early

    def _begin_later(self, seconds: float) -> None:
        self.started_at += seconds
        self._began += seconds

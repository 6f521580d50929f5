"""Seconds by phase of one step."""

import time


class Clock:
    """Seconds by phase of one step, from the end of the one before."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as `phase`."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def leave_out(self) -> None:
        """Count the time since the last lap for no step."""
        now = time.monotonic()
        self.started_at += now - self._last
        self._last = now

    def note(self, seconds: dict[str, float]) -> None:
        """Add seconds of work that ran in parallel to these phases."""
        self.seconds.update(seconds)

    def begin_at(self, started_at: float) -> None:
        """Drop the wait before Unix second `started_at`: until then the servers were starting."""
        early = max(0.0, started_at - self.started_at)
        self.started_at += early
        self.seconds["wait"] = max(0.0, self.seconds.get("wait", 0.0) - early)

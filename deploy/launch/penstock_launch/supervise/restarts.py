"""The rule for a service that died: when it is started again, and when a restart cannot help.

Pure: the input is the death and its time, the result a delay or a reason to end.
"""

from collections import deque
from dataclasses import dataclass

from penstock.errors import ConfigError, EngineStartError, LeaseLostError, NonFiniteError, StallError

COMMAND_NOT_FOUND = 127

# Errors that the same service would raise again at its next start.
HOPELESS = {
    # DataError and RewardError share it.
    ConfigError.exit_code: "its configuration or data cannot be used",
    StallError.exit_code: "no progress, and none is possible",
    LeaseLostError.exit_code: "another trainer has taken over this run",
    NonFiniteError.exit_code: "training has diverged",
    COMMAND_NOT_FOUND: "its command cannot be started",
}


@dataclass(frozen=True)
class RestartPolicy:
    """Exponential backoff, and a limit: `max_deaths` within `window_seconds`, or in a row without becoming ready."""

    max_deaths: int = 5
    window_seconds: float = 120.0
    first_delay_seconds: float = 0.5
    longest_delay_seconds: float = 15.0


@dataclass(frozen=True)
class Restart:
    """Start it again after this delay."""

    delay_seconds: float


@dataclass(frozen=True)
class GiveUp:
    """End everything, for this reason."""

    reason: str


class Deaths:
    """The deaths of one service in this launch."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._recent: deque[float] = deque()
        self._in_a_row = 0
        self._has_been_ready = False

    def ready(self) -> None:
        """The service can work."""
        self._has_been_ready = True
        self._in_a_row = 0

    def died(self, exit_code: int, now: float) -> Restart | GiveUp:
        """The verdict on a death at `now` (seconds of any monotonic clock)."""
        if exit_code in HOPELESS:
            return GiveUp(HOPELESS[exit_code])
        if exit_code == EngineStartError.exit_code and not self._has_been_ready:
            return GiveUp("its inference engine does not start")
        policy = self._policy
        self._recent.append(now)
        self._in_a_row += 1
        while now - self._recent[0] > policy.window_seconds:
            self._recent.popleft()
        if len(self._recent) >= policy.max_deaths:
            return GiveUp(f"it died {len(self._recent)} times within {policy.window_seconds:g} s")
        if self._in_a_row >= policy.max_deaths:
            return GiveUp(f"it died {self._in_a_row} times in a row before it could work")
        delay = policy.first_delay_seconds * 2.0 ** (len(self._recent) - 1)
        return Restart(min(delay, policy.longest_delay_seconds))

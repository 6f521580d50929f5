"""The calls that the pool was given and has not answered, and the attempts of each function that failed in a row.

Owns what is said of a function that keeps its callers waiting, long before a deadline or a breaker ends that.
Invariant: it only counts; nothing waits for it. A call waits from when the pool is given it, queued or in a process.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from penstock_reward.processes.messages import Call, Outcome

SLOW_SECONDS = 5.0  # that a call runs, before it is worth a line
TIMES_SLOWER = 3.0  # than the slowest of the last ones: a function that always takes long is no trouble
NUM_TIMED = 16
FAILED_IN_A_ROW = 3  # attempts; one is enough if it was killed at its deadline
MAX_REASON_CHARS = 160


@dataclass(eq=False)
class _Asked:
    """Calls of one function that were given together."""

    at: float
    num: int = 0


@dataclass
class _Function:
    asked: list[_Asked] = field(default_factory=list)
    began_at: list[float] = field(default_factory=list)
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_TIMED))
    num_failed: int = 0
    last: Outcome | None = None


class InFlight:
    """The calls of all functions."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._functions: dict[str, _Function] = {}

    @contextmanager
    def asked(self, calls: Iterable[Call]) -> Iterator[Callable[[Call], None]]:
        """Calls that wait until each is answered, by what this yields, or until all are given up."""
        given: dict[str, _Asked] = {}
        now = self._clock()
        for call in calls:
            if call.function not in given:
                given[call.function] = _Asked(now)
                self._of(call.function).asked.append(given[call.function])
            given[call.function].num += 1

        def answered(call: Call) -> None:
            given[call.function].num -= 1

        try:
            yield answered
        finally:
            for function, each in given.items():
                self._of(function).asked.remove(each)

    @contextmanager
    def running(self, function: str) -> Iterator[Callable[[Outcome], None]]:
        """A call that a process has begun; its outcome goes to what this yields."""
        known, began_at = self._of(function), self._clock()
        known.began_at.append(began_at)

        def ended(outcome: Outcome) -> None:
            if outcome.value is None:
                known.num_failed, known.last = known.num_failed + 1, outcome
            else:
                known.num_failed, known.last = 0, None
                known.seconds.append(outcome.seconds)

        try:
            yield ended
        finally:
            known.began_at.remove(began_at)

    def describe(self) -> str:
        """The functions that keep callers waiting or fail, in words; empty if none does."""
        return "; ".join(filter(None, map(self._shown, self._functions)))

    def _of(self, function: str) -> _Function:
        return self._functions.setdefault(function, _Function())

    def _shown(self, function: str) -> str:
        known, now = self._functions[function], self._clock()
        ran = now - min(known.began_at, default=now)
        is_slow = ran > max(SLOW_SECONDS, TIMES_SLOWER * max(known.seconds, default=0.0))
        killed = known.last is not None and known.last.kind == "timeout"
        if not is_slow and not killed and known.num_failed < FAILED_IN_A_ROW:
            return ""
        parts = []
        if num := sum(each.num for each in known.asked):
            oldest = now - min(each.at for each in known.asked if each.num)
            parts.append(f"{num} call{'s wait, the oldest' if num > 1 else ' waits'} for {oldest:.0f} s")
        if known.last is not None:
            reason = " ".join(known.last.reason.split())[:MAX_REASON_CHARS]
            plural = "s" if known.num_failed > 1 else ""
            parts.append(f"{known.num_failed} attempt{plural} failed in a row, last: {reason}")
        return f"{function}: {', '.join(parts)}" if parts else ""

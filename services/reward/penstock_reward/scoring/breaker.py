"""Circuit breakers: one per reward function, so that an outage of its services parks groups and fails none.

Owns their state. Only failures that look like an outage count (`messages.OUTAGE_KINDS`): an answer of any kind, an
exception of the function's own included, shows that it works. A completion that hangs or crashes the function looks
like an outage too. To distinguish both, a call that was answered before is repeated: it fails only in an outage.

Invariants: failures of one prompt open no breaker of a function that can still answer; at most one group probes a
breaker that is half open; the group that probes changes with every probe, so that one group at fault keeps no breaker
open for the others; when a breaker closes, the waiting groups continue in their order. No I/O.

       many failures in a row, and an answered             cool-down is over
       call that fails when it is repeated
      closed ---------------------> open -------------------------> half-open
        ^                             ^                                |  |
        |                             '---- the probe fails -----------'  |
        '---------------------------------- any call answers -------------'

Each attempt counts as soon as it has failed. Many are `limit`, or MOST_HANGS that were killed at their deadline: a
suspicion costs one repeated call, and a function that hangs would need minutes for `limit` failures.

Before the first answer there is no call to repeat. Then failures of two prompts open it, and failures of one if the
function declared them (`transient`).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

log = logging.getLogger(__name__)

MAX_REASON_CHARS = 160
MOST_HANGS = 3  # killed at their deadline, in a row: each has cost a process that long, so there are no `limit` of them
MIN_PROMPTS = 2  # that fail before any call was answered: failures of one prompt may be its own fault
NUM_ANSWERED = 16  # calls kept; more than the trivial ones, such as empty completions, that come in a row


class BreakerState(StrEnum):
    """The calls that a breaker lets through: all, none, one."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(frozen=True)
class AnsweredCall:
    """A call that was answered, and its duration."""

    prompt: str
    completion: str
    answer: str
    metadata: dict[str, Any]
    seconds: float


@dataclass(eq=False)
class _Waiter:
    place: int
    num_probes: int
    admitted: "asyncio.Future[bool]"


class Breaker:
    """The breaker of one function."""

    def __init__(self, function: str, limit: int, cooldown_seconds: float, on_change: "OnChange") -> None:
        """`limit`: failures in a row that make it suspect; 0: it never opens."""
        self.function = function
        self.state = BreakerState.CLOSED
        self._limit = limit
        self._cooldown_seconds = cooldown_seconds
        self._on_change = on_change
        self.opened = asyncio.Event()
        """Set while it keeps calls back."""
        self._num_failures = self._num_hangs = 0
        self._failed_groups: set[int] = set()
        self._declared = False
        self._is_tested = False
        self._last_reason = ""
        self._answered: deque[AnsweredCall] = deque(maxlen=NUM_ANSWERED)
        self._waiting: list[_Waiter] = []
        self._probing = False
        self._timer: asyncio.TimerHandle | None = None

    def __str__(self) -> str:
        return f"{self.function} ({self.why})"

    @property
    def why(self) -> str:
        """Its failures, in words."""
        return f"{self._num_failures} failures in a row, last: {self._last_reason}"

    @property
    def reference(self) -> AnsweredCall | None:
        """The call to repeat: the slowest of the last, since a quick one may not have used the failed service."""
        return max(self._answered, key=lambda each: each.seconds, default=None)

    @property
    def is_suspect(self) -> bool:
        """Whether it is closed, and only a repeat of the reference call can show if it must open; nobody makes it."""
        return self.has_too_many and bool(self._answered) and not self._is_tested

    @property
    def has_too_many(self) -> bool:
        """Whether there are as many failures in a row as make it suspect, while it is closed."""
        many = self._num_failures >= self._limit or self._num_hangs >= min(self._limit, MOST_HANGS)
        return self.state is BreakerState.CLOSED and self._limit > 0 and many

    @contextmanager
    def tested(self) -> Iterator[None]:
        """While somebody repeats the reference call."""
        self._is_tested = True
        try:
            yield
        finally:
            self._is_tested = False

    def answered(self, call: AnsweredCall) -> None:
        """A call was answered."""
        self._answered.append(call)
        self._num_failures = self._num_hangs = 0
        self._failed_groups.clear()
        self._declared = False
        if self.state is BreakerState.CLOSED:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._change(BreakerState.CLOSED)
        waiting, self._waiting = sorted(self._waiting, key=lambda each: each.place), []
        for waiter in waiting:
            if not waiter.admitted.done():
                waiter.admitted.set_result(False)

    def failed(self, reason: str, group: int, *, declared: bool, hung: bool = False) -> None:
        """An attempt of a group failed as in an outage. Call it at once.

        `declared`: the function raised, and was not killed. `hung`: it was killed at its deadline.
        """
        self._num_failures += 1
        self._num_hangs += hung
        self._failed_groups.add(group)
        self._declared |= declared
        self._last_reason = " ".join(reason.split())[:MAX_REASON_CHARS]
        certain = not self._answered and (self._declared or len(self._failed_groups) >= MIN_PROMPTS)
        if (self.has_too_many and certain) or self.state is BreakerState.HALF_OPEN:
            self.open()

    def open(self) -> None:
        """Keep calls back for the cool-down."""
        if self.state is BreakerState.OPEN:
            return
        self._change(BreakerState.OPEN)
        self._timer = asyncio.get_running_loop().call_later(self._cooldown_seconds, self._half_open)

    async def admission(self, place: int, num_probes: int) -> bool:
        """Wait while it is open: False once it is closed, True for the one that must now probe it.

        `place`: the order in which groups continue. `num_probes`: how often this one has probed. After True the caller
        must call `probe_ended`, whatever the result of the probe.
        """
        if self.state is BreakerState.CLOSED:
            return False
        waiter = _Waiter(place, num_probes, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._choose_prober()
        try:
            return await waiter.admitted
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            if waiter.admitted.done() and not waiter.admitted.cancelled() and waiter.admitted.result():
                self.probe_ended()
            raise

    def probe_ended(self) -> None:
        """The probing group has made its call, or never will."""
        self._probing = False
        self._choose_prober()

    def _half_open(self) -> None:
        self._change(BreakerState.HALF_OPEN)
        self._choose_prober()

    def _choose_prober(self) -> None:
        if self.state is not BreakerState.HALF_OPEN or self._probing or not self._waiting:
            return
        waiter = min(self._waiting, key=lambda each: (each.num_probes, each.place))
        self._waiting.remove(waiter)
        if waiter.admitted.done():  # cancelled, and about to leave
            self._choose_prober()
            return
        self._probing = True
        waiter.admitted.set_result(True)

    def _change(self, state: BreakerState) -> None:
        self.state = state
        if state is BreakerState.CLOSED:
            self.opened.clear()
        else:
            self.opened.set()
        if state is BreakerState.OPEN:
            log.warning(
                "breaker of reward function %s is open: groups that need it are parked; a probe in %g s",
                self,
                self._cooldown_seconds,
            )
        else:
            log.warning("breaker of reward function %s is %s", self.function, state)
        self._on_change(self.function, state is not BreakerState.CLOSED)


OnChange = Callable[[str, bool], None]


class Breakers:
    """The breakers of all functions; one is made when its function is first used."""

    def __init__(self, limit: int, cooldown_seconds: float, on_change: OnChange) -> None:
        """`on_change`: called with the function and whether its breaker keeps calls back."""
        self._limit = limit
        self._cooldown_seconds = cooldown_seconds
        self._on_change = on_change
        self._breakers: dict[str, Breaker] = {}

    def of(self, function: str) -> Breaker:
        """The breaker of a function."""
        if function not in self._breakers:
            self._breakers[function] = Breaker(function, self._limit, self._cooldown_seconds, self._on_change)
        return self._breakers[function]

    def blocking(self, functions: Iterable[str]) -> Breaker | None:
        """The first breaker that keeps calls of these functions back."""
        return next((each for name in functions if (each := self.of(name)).state is not BreakerState.CLOSED), None)

    def open_ones(self) -> dict[str, str]:
        """By function, why its breaker is open."""
        return {each.function: each.why for each in self._breakers.values() if each.state is not BreakerState.CLOSED}

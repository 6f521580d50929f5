"""The circuit breaker of the environment: an outage of what it needs must not use up the attempts of all tickets.

Owns its state. An attempt fails here if its infrastructure does; whatever the model does shows that the environment
works. A row may be at fault itself, and must not keep others back, nor wait for what never comes: a ticket that only
fails, while others work or in `MOST_PROBES` probes, counts for nothing from then on and waits no more. Invariants: the
failures of fewer than `MIN_TICKETS` tickets never open it; while it is open, one attempt at a time probes, of tickets
first that have not failed, and the attempts take turns; any attempt that works closes it; no ticket waits for more than
`MOST_PROBES` probes of its own. So an environment that never works again ends episodes slowly, and the trainer sees it.
No I/O.

       N failures in a row, of several tickets         cool-down is over
      closed --------------------------------> open <------------------> one probe
        ^                                                                   |
        '----------------------- an attempt works --------------------------'
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable

log = logging.getLogger(__name__)

LIMIT = 16  # failures in a row; fewer may be chance where many episodes run
MIN_TICKETS = 4  # fewer are rows at fault as likely as not: those that fail are the last to end, and alone then
MOST_PROBES = 2
NUM_REMEMBERED = 1024  # tickets: more than run at once
COOL_DOWN_SECONDS = 10.0  # before the first probe; doubled with each that fails
MAX_COOL_DOWN_SECONDS = 120.0
REASON_CHARS = (60, 180)  # of a long one: its beginning says what failed, and its end, as in a traceback, why


class Breaker:
    """Counts failures in a row, and keeps attempts back."""

    def __init__(
        self,
        on_change: Callable[[bool], None],
        *,
        limit: int = LIMIT,
        cool_down_seconds: float = COOL_DOWN_SECONDS,
    ) -> None:
        """`on_change`: called with whether it is open."""
        self.is_open = False
        self._on_change = on_change
        self._limit = limit
        self._first_seconds = cool_down_seconds
        self._cool_down_seconds = cool_down_seconds
        self._num_failures = 0
        self._tickets: set[str] = set()  # of those failures
        self._at_fault: deque[str] = deque(maxlen=NUM_REMEMBERED)
        self._proven: deque[str] = deque(maxlen=NUM_REMEMBERED)  # tickets of which an attempt has worked
        self._num_probes: Counter[str] = Counter()  # those that failed, by ticket, since it opened
        self._last_reason = ""
        self._waiting: deque[tuple[str, asyncio.Future[bool]]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._probing = ""  # the ticket whose attempt does

    @property
    def num_waiting(self) -> int:
        """Attempts that are kept back."""
        return len(self._waiting)

    def __str__(self) -> str:
        return f"{self._num_failures} attempts failed in a row, the last: {self._last_reason}"

    async def admission(self, ticket_key: str) -> bool:
        """Wait while it is open: False once it is closed, True for the attempt that must probe now.

        After True the caller calls `probe_ended`, whatever becomes of the attempt.
        """
        if not self.is_open or ticket_key in self._at_fault:
            return False
        admitted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        waiter = (ticket_key, admitted)
        self._waiting.append(waiter)
        self._admit_probe()
        try:
            return await admitted
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            if admitted.done() and not admitted.cancelled() and admitted.result():
                self.probe_ended()
            raise

    def worked(self, ticket_key: str) -> None:
        """An attempt ended without a failure of its infrastructure: what others failed of meanwhile is their own."""
        if ticket_key not in self._proven:
            self._proven.append(ticket_key)
        if ticket_key in self._at_fault:
            self._at_fault.remove(ticket_key)
        for other in self._tickets.difference(self._proven):
            self._blame(other)
        self._num_failures = 0
        self._tickets.clear()
        if not self.is_open:
            return
        self.is_open = False
        self._cool_down_seconds = self._first_seconds
        self._num_probes.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        log.warning("the environment works again: %d attempts go on", len(self._waiting))
        self._on_change(False)
        self._let_go(lambda _: True)

    def failed(self, ticket_key: str, reason: str) -> None:
        """The infrastructure of an attempt failed."""
        if ticket_key in self._at_fault:
            return
        self._num_failures += 1
        self._tickets.add(ticket_key)
        self._last_reason = shortened(reason)
        if not self.is_open and self._num_failures >= self._limit and len(self._tickets) >= MIN_TICKETS:
            self.is_open = True
            log.error("the environment fails: %s; episodes wait, one at a time probes", self)
            self._on_change(True)
            self._cool_down()
        elif ticket_key == self._probing:
            self._num_probes[ticket_key] += 1
            if self._num_probes[ticket_key] >= MOST_PROBES:
                self._blame(ticket_key)

    def probe_ended(self) -> None:
        """The probing attempt has ended; if it has failed, the next one comes later than it did."""
        self._probing = ""
        if self.is_open:
            self._cool_down_seconds = min(2 * self._cool_down_seconds, MAX_COOL_DOWN_SECONDS)
            self._cool_down()

    def _blame(self, ticket_key: str) -> None:
        """The ticket is at fault: what waits of it goes on."""
        self._at_fault.append(ticket_key)
        self._let_go(lambda key: key == ticket_key)

    def _let_go(self, goes_on: Callable[[str], bool]) -> None:
        for waiter in [each for each in self._waiting if goes_on(each[0])]:
            self._waiting.remove(waiter)
            if not waiter[1].done():
                waiter[1].set_result(False)

    def _cool_down(self) -> None:
        if self._timer is not None:  # the probe is one of an outage before this one
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._cool_down_seconds, self._cooled_down)

    def _cooled_down(self) -> None:
        self._timer = None
        self._admit_probe()

    def _admit_probe(self) -> None:
        while self.is_open and self._timer is None and not self._probing and self._waiting:
            waiter = min(self._waiting, key=lambda each: (each[0] in self._tickets, self._num_probes[each[0]]))
            self._waiting.remove(waiter)
            if not waiter[1].done():  # else it was cancelled, and is about to leave
                self._probing = waiter[0]
                waiter[1].set_result(True)


def shortened(reason: str) -> str:
    """A reason in one line of bounded length.

    >>> shortened("it   ended"), len(shortened("x" * 999))
    ('it ended', 245)
    """
    text, (head, tail) = " ".join(reason.split()), REASON_CHARS
    return text if len(text) <= head + tail else f"{text[:head]} ... {text[-tail:]}"

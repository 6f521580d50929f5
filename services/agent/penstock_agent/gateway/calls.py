"""Calls of the model within a session: which requests are one call, and whether its answer has reached a client.

Invariants: a request that repeats one whose answer never reached the client is the same call, and a request that asks
again after an answer is another one, a sibling. A call has one answer, however many requests ask for it. Pure, but for
the future that requests wait on.

    asked --generated--> answered --sent to the end--> delivered
      |                     '-- nobody asks any more --> never delivered: not trained
      '-- failed: forgotten; whoever asks again begins a new call

Signs that a request is a repetition: the same Idempotency-Key; the same content, while no client waits for the call any
more; the same content and a header that says so (`X-Stainless-Retry-Count`, of OpenAI's own clients). Two clients that
wait for the same content at the same time, without such a sign, are siblings: an agent that draws several answers does
that.
"""

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from penstock_agent.gateway.answers import ChatAnswer
from penstock_agent.gateway.refusals import RequestRefusedError
from penstock_agent.gateway.requests import ChatRequest

REPEAT_SECONDS = 10.0
"""A retry this long after an answer was sent is for that answer: OpenAI's clients wait up to 8 s before they repeat."""


class Call:
    """One call of the model, and the requests that wait for its answer."""

    def __init__(self, digest: bytes, idempotency_key: str) -> None:
        self.digest = digest
        self.idempotency_key = idempotency_key
        self.answer: asyncio.Future[ChatAnswer] = asyncio.get_running_loop().create_future()
        self.answer.add_done_callback(_retrieve)
        self.recorded: int | None = None
        """Once its answer is recorded: how many were recorded before it."""
        self.num_waiting = 0
        self.delivered_at: float | None = None
        """By the clock of `Calls`; None: no client has got the answer."""

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """A client waits while the block runs."""
        self.num_waiting += 1
        try:
            yield
        finally:
            self.num_waiting -= 1


def _retrieve(answer: "asyncio.Future[ChatAnswer]") -> None:
    """An error that nobody waits for any more is no defect."""
    if not answer.cancelled():
        answer.exception()


class Calls:
    """The calls of one session that a later request may still be a repetition of, and those that were not delivered."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._by_digest: dict[bytes, list[Call]] = defaultdict(list)
        self._by_idempotency: dict[str, Call] = {}
        self._delivered: deque[Call] = deque()  # those that are still known by their digest, the oldest first
        self._failed: set[bytes] = set()

    def find(self, request: ChatRequest, digest: bytes) -> Call | None:
        """The call that this request repeats; None: it is a new one."""
        if request.idempotency_key:
            call = self._by_idempotency.get(request.idempotency_key)
            if call is not None and call.digest != digest:
                raise RequestRefusedError(
                    "the Idempotency-Key is that of another request with other content; expected a new one"
                )
            return call
        self._forget_delivered()
        if request.is_retry:
            return self._retried(digest)
        for call in self._by_digest.get(digest, ()):
            if call.delivered_at is None and not call.num_waiting and not call.idempotency_key:
                return call
        return None

    def _retried(self, digest: bytes) -> Call | None:
        """The call with the fewest clients; one whose answer was lost on its way only if there is no other."""
        if digest in self._failed:  # the try before got an error: this one is for none of the others
            self._failed.discard(digest)
            return None
        known = self._by_digest.get(digest, ())
        undelivered = [each for each in known if each.delivered_at is None]
        if undelivered:
            return min(undelivered, key=lambda each: each.num_waiting)
        return known[-1] if known else None

    def begin(self, request: ChatRequest, digest: bytes) -> Call:
        """A new call."""
        call = Call(digest, request.idempotency_key)
        self._failed.discard(digest)
        self._by_digest[digest].append(call)
        if request.idempotency_key:
            self._by_idempotency[request.idempotency_key] = call
        return call

    def failed(self, call: Call) -> None:
        """Forget a call without an answer, so that its repetition begins anew."""
        self._by_digest[call.digest].remove(call)
        self._by_idempotency.pop(call.idempotency_key, None)
        self._failed.add(call.digest)

    def delivered(self, call: Call) -> None:
        """A client has got the answer."""
        if call.delivered_at is None:
            call.delivered_at = self._clock()
            self._delivered.append(call)

    def undelivered(self) -> set[int]:
        """Which of the recorded answers have reached no client."""
        calls = [each for calls in self._by_digest.values() for each in calls]
        return {each.recorded for each in calls if each.recorded is not None and each.delivered_at is None}

    def _forget_delivered(self) -> None:
        """Drop what a retry can no longer be for: answers are held for seconds, not for the episode."""
        since = self._clock() - REPEAT_SECONDS
        while self._delivered and (self._delivered[0].delivered_at or 0.0) <= since:
            call = self._delivered.popleft()
            self._by_digest[call.digest].remove(call)
            if not self._by_digest[call.digest]:
                del self._by_digest[call.digest]

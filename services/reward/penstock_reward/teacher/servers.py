"""The servers of a teacher: which of them is asked next, and which are down.

Owns what runs on each, and its state. Invariants: a server has at most `max_running` questions, unless one request
alone has more; one that has failed, or has just been named, is asked nothing but a probe, until it answers that.

    up -- a request fails as in an outage --> down -- seconds later, and every few seconds: a probe --> answered --> up

A server may answer probes and no request: its queue is full, or a proxy is before it. So it is left alone first, and
questions that have failed there go to another one that is up, even if they have to wait for it.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from penstock.errors import EngineError
from penstock_reward.teacher.server import PROBE, TeacherServer

log = logging.getLogger(__name__)

PROBE_SECONDS = 2.0  # before each probe of a server that has failed
MAX_REASON_CHARS = 160
NOT_ASKED = "none has been asked"

Sleep = Callable[[float], Awaitable[None]]


@dataclass(eq=False)
class _State:
    server: TeacherServer
    num_running: int = 0
    is_up: bool = False
    why_down: str = ""
    """Empty also before its first answer."""
    failed: asyncio.Event = field(default_factory=asyncio.Event)


class TeacherServers:
    """Servers of one model."""

    def __init__(self, servers: Sequence[TeacherServer], max_running: int, sleep: Sleep = asyncio.sleep) -> None:
        self._states = [_State(each) for each in servers]
        self._max_running = max_running
        self._sleep = sleep
        self._changed = asyncio.Condition()
        for each in self._states:
            each.failed.set()

    @property
    def down(self) -> dict[str, str]:
        """Of each server that has failed and not answered since, its address and why."""
        return {each.server.url: each.why_down for each in self._states if each.why_down}

    @property
    def not_ready(self) -> str | None:
        """Why no server can be asked; None if one can."""
        if any(each.is_up for each in self._states):
            return None
        return f"no server of teacher.urls answers; {next(iter(self.down.values()), NOT_ASKED)}"

    @contextlib.asynccontextmanager
    async def room(self, num_questions: int, failed_at: Collection[TeacherServer] = ()) -> AsyncIterator[TeacherServer]:
        """The server that is up and has the least to do, once it has room; it has the questions until the end.

        failed_at: of each attempt of these questions that has failed, the server; those with fewer come first.
        """
        num_failed = Counter(failed_at)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free(num_questions, num_failed) is not None)
            state = self._free(num_questions, num_failed)
            assert state is not None
            state.num_running += num_questions
        try:
            yield state.server
        finally:
            state.num_running -= num_questions
            await self._notify()

    def _free(self, num_questions: int, num_failed: Counter[TeacherServer]) -> _State | None:
        up = [each for each in self._states if each.is_up]
        least = min(up, key=lambda each: (num_failed[each.server], each.num_running), default=None)
        if least is None or (least.num_running and least.num_running + num_questions > self._max_running):
            return None
        return least

    def failed(self, server: TeacherServer, reason: str) -> None:
        """A request has failed as in an outage: no other one goes there before a probe."""
        state = next(each for each in self._states if each.server is server)
        if state.is_up:
            log.warning("a server of the teacher is down, its groups wait: %s", reason)
        state.is_up, state.why_down = False, _short(reason)
        state.failed.set()

    async def keep_probing(self) -> None:
        """Bring servers that are down up again, for ever."""
        async with asyncio.TaskGroup() as tasks:
            for state in self._states:
                tasks.create_task(self._probe(state))

    async def _probe(self, state: _State) -> None:
        while True:
            await state.failed.wait()
            if state.why_down:  # before its first answer it is asked at once
                await self._sleep(PROBE_SECONDS)
            try:
                await state.server.logprobs([PROBE])
            except (EngineError, TimeoutError) as error:
                state.why_down = _short(str(error))
                continue
            state.failed.clear()
            state.is_up, state.why_down = True, ""
            log.info("the server of the teacher at %s answers", state.server.url)
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def close(self) -> None:
        for state in self._states:
            await state.server.close()


def _short(reason: str) -> str:
    return " ".join(reason.split())[:MAX_REASON_CHARS]

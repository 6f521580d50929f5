"""Keeps the services of a run alive until its trainer has finished, and ends them in order.

    start all -> [ a child died -> restart after a delay | give up ] -> trainer exits 0 | stop asked -> end in order

Of several services of a kind some may be given up for good: the run goes on while one of the kind is left.

Invariant: when `run` returns, all children have ended, and all their descendants that were seen. One loop does
everything; SIGCHLD, ends on other hosts, requests and the next due restart wake it; it never polls.

The end: the trainer first (it writes its checkpoint and needs the others for that), then all others except the queue,
then the queue; each has a grace period, after which it is killed.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from penstock.errors import ConfigError, PenstockError
from penstock.runtime.process import ProcessIdentity, signal_all
from penstock_launch.supervise.child import Child, ChildState
from penstock_launch.supervise.restarts import GiveUp

TRAINER = "trainer"
QUEUE = "queue"
FAILED_EXIT_CODE = 1
ENDING = "ending"


@dataclass(frozen=True)
class Grace:
    """Seconds between SIGTERM and SIGKILL."""

    trainer_seconds: float = 120.0  # it writes a checkpoint
    others_seconds: float = 20.0  # an inference engine takes some seconds to end
    queue_seconds: float = 15.0  # it flushes its file


@dataclass(frozen=True)
class RunOutcome:
    """How the run ended. `lines`: the last lines of the service that caused the end."""

    exit_code: int
    reason: str
    lines: tuple[str, ...] = ()


class Supervisor:
    """Supervises children; `on_event` receives every event for the user, one line each."""

    def __init__(
        self,
        children: Sequence[Child],
        on_event: Callable[[str], None],
        survivors: Callable[[str], Iterable[ProcessIdentity]],
        grace: Grace | None = None,
        before_queue_ends: Callable[[], None] = lambda: None,
    ) -> None:
        """`survivors(name)`: processes of a child that may outlive it. `before_queue_ends` may block."""
        self.children = children
        self._on_event = on_event
        self._survivors = survivors
        self._grace = grace or Grace()
        self._before_queue_ends = before_queue_ends
        self.ending = ""
        """What is waited for at the end of the run, in words; empty before it."""
        self._stop: RunOutcome | None = None
        self._kill = False
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def wake(self) -> None:
        """Check all children again; from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the supervision has ended
                self._loop.call_soon_threadsafe(self._changed.set)

    def interrupt(self, signal_number: int) -> None:
        """A signal such as Ctrl-C: the first ends in order, the second kills.

        SIGHUP never kills: a terminal that is closed sends it twice, itself and by its shell.
        """
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        if self._stop is None:
            self._on_event(f"{name}: ending in order, the trainer writes its checkpoint; once more kills everything")
            self._stop = RunOutcome(128 + signal_number, f"stopped by {name}")
        elif signal_number != signal.SIGHUP:
            self._on_event(f"{name} again: killing everything")
            self._kill = True
        self._changed.set()

    def stop(self, outcome: RunOutcome) -> None:
        """End everything in order, with this outcome unless another end is on its way; from any thread."""
        if self._stop is None:
            self._on_event(f"{outcome.reason}: ending in order, the trainer writes its checkpoint")
            self._stop = outcome
            self.wake()

    async def run(self) -> RunOutcome:
        """Start all children that do not run yet, and supervise; returns when all have ended."""
        loop = self._loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._changed.set)
        try:
            outcome = await self._supervise()
            await self._end()
            return outcome
        finally:
            loop.remove_signal_handler(signal.SIGCHLD)
            self._kill_everything()

    async def _supervise(self) -> RunOutcome:
        while True:
            self._changed.clear()
            if self._stop is not None:
                return self._stop
            for child in self.children:
                if (exit_code := child.poll()) is not None and (outcome := self._died(child, exit_code)):
                    return outcome
            now = time.monotonic()
            for child in self.children:
                if child.state is ChildState.WAITING and child.start_at <= now and (outcome := self._start(child)):
                    return outcome
            await self._wait(
                min((each.start_at for each in self.children if each.state is ChildState.WAITING), default=None)
            )

    def _start(self, child: Child) -> RunOutcome | None:
        """Start it; a start that the host refuses (no room for its log, no process left) counts as a death."""
        try:
            child.start(self.wake)
        except (OSError, PenstockError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            child.not_started(f"cannot be started: {reason}")
            return self._after(child, FAILED_EXIT_CODE, [str(error)])
        pid = f", pid {child.pid}" if child.pid else ""  # unknown until it has a place elsewhere
        self._on_event(f"{child.name}: started{pid}, log {child.log_path}")
        return None

    def _died(self, child: Child, exit_code: int) -> RunOutcome | None:
        """Plan its restart, or return how everything ends."""
        self._clear(child)
        if child.name == TRAINER and exit_code == 0:
            return self._ending(RunOutcome(0, "the trainer has finished"))
        return self._after(child, exit_code, child.error_lines())

    def _ending(self, outcome: RunOutcome) -> RunOutcome:
        """Say that everything ends. A later request to stop is the second one: the end is on its way."""
        self._stop = outcome
        self._on_event(f"{outcome.reason}; ending all services")
        return outcome

    def _after(self, child: Child, exit_code: int, words: Sequence[str]) -> RunOutcome | None:
        """As `_died`, for a child of which nothing runs. `words`: its last ones."""
        verdict = child.deaths.died(exit_code, time.monotonic())
        if isinstance(verdict, GiveUp):
            others = [each for each in self.children if each is not child and each.kind == child.kind]
            if exit_code != ConfigError.exit_code and any(each.expected for each in others):
                child.given_up = f"{verdict.reason}{f': {words[-1]}' if words else ''}"
                child.detail = f"given up ({child.detail}), {child.given_up}"
                self._on_event(f"{child.name}: {child.detail}; the run goes on without it")
                return None
            alone = f", and {names} had been given up" if (names := ", ".join(_given_up(others))) else ""
            reason = f"{child.name} ended ({child.detail}): {verdict.reason}{alone}"
            return self._ending(RunOutcome(exit_code if exit_code > 0 else FAILED_EXIT_CODE, reason, tuple(words)))
        child.state = ChildState.WAITING
        child.start_at = time.monotonic() + verdict.delay_seconds
        said = f": {words[-1]}" if words else ""
        self._on_event(f"{child.name}: died ({child.detail}){said}; restart in {verdict.delay_seconds:g} s")
        return None

    async def _end(self) -> None:
        trainers = [child for child in self.children if child.name == TRAINER]
        queues = [child for child in self.children if child.name == QUEUE]
        others = [child for child in self.children if child not in trainers and child not in queues]
        await self._end_some(trainers, self._grace.trainer_seconds)
        await self._end_some(others, self._grace.others_seconds)
        self.ending = f"{ENDING}: letting others have the run"
        await asyncio.to_thread(self._before_queue_ends)
        await self._end_some(queues, self._grace.queue_seconds)

    async def _end_some(self, children: Sequence[Child], grace_seconds: float) -> None:
        """SIGTERM, wait, SIGKILL; other children that die meanwhile are recorded and not restarted."""
        running, began = [child.name for child in children if child.running], time.monotonic()
        if running:
            self.ending = f"{ENDING}: waiting for the end of {', '.join(running)} (at most {grace_seconds:g} s)"
        for child in children:
            child.send(signal.SIGTERM)
            if child.state is ChildState.WAITING:
                child.state = ChildState.ENDED
        deadline = time.monotonic() + grace_seconds
        while True:
            self._changed.clear()
            for child in self.children:
                child.poll()
            left = [child for child in children if child.running]
            if not left or self._kill or time.monotonic() >= deadline:
                break
            await self._wait(deadline)
        for child in left:
            if not self._kill:
                self._on_event(f"{child.name}: did not end within {grace_seconds:g} s and is killed")
        if running and not left:
            self._on_event(f"{', '.join(running)}: ended after {time.monotonic() - began:.1f} s")
        for child in children:
            self._clear(child)

    def _clear(self, child: Child) -> None:
        """Kill the rest of a child and of its descendants."""
        child.kill_session()
        signal_all(self._survivors(child.name), signal.SIGKILL)

    def _kill_everything(self) -> None:
        for child in self.children:
            self._clear(child)

    async def _wait(self, deadline: float | None) -> None:
        """Wait until something changed, or until `deadline` of time.monotonic."""
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait_for(self._changed.wait(), timeout)
        except TimeoutError:
            return


def _given_up(children: Iterable[Child]) -> list[str]:
    return [child.name for child in children if child.given_up]

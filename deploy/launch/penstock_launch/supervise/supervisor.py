"""Keeps the services of a run alive until its trainer has finished, and ends them in order.

    start all -> [ a child died -> restart after a delay | give up ] -> trainer exits 0 | stop asked -> end in order

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

from penstock.errors import ConfigError
from penstock.runtime.process import ProcessIdentity, signal_all
from penstock_launch.supervise.child import Child, ChildState
from penstock_launch.supervise.restarts import GiveUp

TRAINER = "trainer"
QUEUE = "queue"
FAILED_EXIT_CODE = 1


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
        *,
        goes_on_with_fewer: bool = False,
    ) -> None:
        """`survivors(name)`: processes of a child that may outlive it.

        `goes_on_with_fewer`: the run may give up some of several services of a kind for good.
        """
        self.children = children
        self._on_event = on_event
        self._survivors = survivors
        self._grace = grace or Grace()
        self._goes_on_with_fewer = goes_on_with_fewer
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
        """A signal such as Ctrl-C: the first ends in order, the second kills."""
        name = "Ctrl-C" if signal_number == signal.SIGINT else signal.Signals(signal_number).name
        if self._stop is None:
            self._on_event(f"{name}: ending in order, the trainer writes its checkpoint; once more kills everything")
            self._stop = RunOutcome(128 + signal_number, f"stopped by {name}")
        else:
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
                if (exit_code := child.poll()) is not None and (outcome := self._died(child, exit_code)) is not None:
                    # A later request to stop is the second one: the end is on its way.
                    self._stop = outcome
                    self._on_event(f"{outcome.reason}; ending all services")
                    return outcome
            now = time.monotonic()
            for child in self.children:
                if child.state is ChildState.WAITING and child.start_at <= now:
                    child.start(self.wake)
                    pid = f", pid {child.pid}" if child.pid else ""  # unknown until it has a place elsewhere
                    self._on_event(f"{child.name}: started{pid}, log {child.log_path}")
            await self._wait(
                min((each.start_at for each in self.children if each.state is ChildState.WAITING), default=None)
            )

    def _died(self, child: Child, exit_code: int) -> RunOutcome | None:
        """Plan its restart, or return how everything ends."""
        self._clear(child)
        if child.name == TRAINER and exit_code == 0:
            return RunOutcome(0, "the trainer has finished")
        verdict = child.deaths.died(exit_code, time.monotonic())
        words = child.error_lines()
        if isinstance(verdict, GiveUp):
            if exit_code != ConfigError.exit_code and self._can_do_without(child):
                said = f": {words[-1]}" if words else ""
                self._on_event(f"{child.name}: given up, {verdict.reason}{said}; the run goes on without it")
                return None
            return RunOutcome(
                exit_code if exit_code > 0 else FAILED_EXIT_CODE,
                f"{child.name} ended ({child.detail}): {verdict.reason}",
                tuple(words),
            )
        child.state = ChildState.WAITING
        child.start_at = time.monotonic() + verdict.delay_seconds
        said = f": {words[-1]}" if words else ""
        self._on_event(f"{child.name}: died ({child.detail}){said}; restart in {verdict.delay_seconds:g} s")
        return None

    def _can_do_without(self, child: Child) -> bool:
        others = [each for each in self.children if each is not child and each.kind == child.kind]
        return self._goes_on_with_fewer and any(each.running or each.state is ChildState.WAITING for each in others)

    async def _end(self) -> None:
        trainers = [child for child in self.children if child.name == TRAINER]
        queues = [child for child in self.children if child.name == QUEUE]
        others = [child for child in self.children if child not in trainers and child not in queues]
        await self._end_some(trainers, self._grace.trainer_seconds)
        await self._end_some(others, self._grace.others_seconds)
        await self._end_some(queues, self._grace.queue_seconds)

    async def _end_some(self, children: Sequence[Child], grace_seconds: float) -> None:
        """SIGTERM, wait, SIGKILL; other children that die meanwhile are recorded and not restarted."""
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

"""One worker process as the service sees it: started, given batches, read until the deadline of each call, killed.

Invariants: no method waits longer than its deadlines; after the first error the process and all its descendants are
killed, and it is never used again (`usable`); the descendants end with the service too, however that ends.
"""

import asyncio
import logging
from collections.abc import Callable

import penstock_reward
from penstock.errors import RewardError
from penstock.workers.guard import GroupGuard
from penstock.workers.process import BrokenWorkerError, ChildProcess
from penstock_reward.functions.registry import not_loaded
from penstock_reward.processes.in_flight import InFlight
from penstock_reward.processes.messages import (
    Accepted,
    Call,
    CallBatch,
    FailureKind,
    FromChild,
    Outcome,
    Refused,
    Start,
    Started,
)

log = logging.getLogger(__name__)

LOAD_SECONDS = 120.0  # imports: reasoning_gym takes 3 s, a user's torch a minute on a cold disk
CHILD = "penstock_reward.processes.child"


class WorkerProcess:
    """A child process that runs reward functions."""

    def __init__(self, timeout_seconds: float, guard: GroupGuard) -> None:
        """`timeout_seconds`: the deadline of each call. `guard`: kills what functions started if the service dies."""
        self._timeout_seconds = timeout_seconds
        self._guard = guard
        try:
            self._child = ChildProcess("reward worker", CHILD, penstock_reward, FromChild)
        except OSError as error:
            raise RewardError(f"cannot start a reward worker: {error}") from None
        guard.watch(self.pid)
        self._child.output.rename("reward function")

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def usable(self) -> bool:
        return self._child.usable

    async def start(self, start: Start) -> dict[str, str]:
        """Load the functions; returns their descriptions. RewardError with the reason if that fails."""
        await self._child.connect()
        answer: Started | Refused
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await self._child.send(start)
                answer = await self._child.receive(Started, Refused)
        except TimeoutError:
            raise RewardError(
                f"reward.functions {', '.join(start.functions)}: not loaded within {LOAD_SECONDS:g} s; "
                "expected modules that import faster"
            ) from None
        except BrokenWorkerError as error:
            raise RewardError(
                f"reward.functions {', '.join(start.functions)}: the worker process that loads them {error}; "
                f"it wrote: {self._child.output.tail or 'nothing'}"
            ) from None
        if isinstance(answer, Refused):
            raise not_loaded(answer.function, answer.reason, start.modules_path)
        self._child.usable = True
        return answer.descriptions

    async def run(
        self, batch: CallBatch, in_flight: InFlight, on_outcome: Callable[[Call, Outcome], None]
    ) -> list[Outcome]:
        """Outcomes of the calls in order. Fewer than calls if the process is lost: the last one then failed.

        An empty list if it was lost before the first call began: no call was at fault, and all may be repeated.
        in_flight: is told of each call. on_outcome: gets each outcome at once.
        """
        outcomes: list[Outcome] = []
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await self._child.send(batch)
                await self._child.receive(Accepted)
        except (TimeoutError, BrokenWorkerError) as error:
            log.warning("reward worker %d was lost before a call: %s", self.pid, error or "no answer")
            self._child.kill()
            return outcomes
        for call in batch.calls:
            with in_flight.running(call.function) as ended:
                outcome = await self._outcome(call)
                ended(outcome)
            outcomes.append(outcome)
            on_outcome(call, outcome)
            if not self.usable:
                break
        return outcomes

    async def _outcome(self, call: Call) -> Outcome:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._child.receive(Outcome)
        except TimeoutError:
            kind: FailureKind = "timeout"
            reason = f"killed after {self._timeout_seconds:g} s (reward.timeout_seconds)"
        except BrokenWorkerError as error:
            kind, reason = "died", f"the worker process {error} during the call"
        self._child.kill()
        log.warning("reward function %s: %s", call.function, reason)
        return Outcome(None, asyncio.get_running_loop().time() - began, kind, reason)

    async def close(self) -> None:
        """Kill, reap and release the pipes; a cancelled caller leaves nothing open either."""
        try:
            await self._child.close()
        finally:
            self._guard.release(self.pid)

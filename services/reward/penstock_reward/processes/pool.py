"""The pool of worker processes: every call gets an outcome, even if its function hangs or crashes.

Owns `num_workers` slots; each slot is a task with one process, replaced as soon as it is lost.
Invariants: a call runs at most once per request; a call that outlives its deadline or its process has failed, and the
calls after it go to another process; every wait has a deadline; no process outlives the pool.

    run() --> jobs --> slot 1: process        G calls of a group are one job, or one per idle slot
                   '-> slot 2: process        (a round trip each; the deadline stays per call)

Backpressure: callers wait for their own outcomes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from penstock.absent_path import looked_for
from penstock.config import RewardSection
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock.errors import RewardError
from penstock.workers.frames import frame
from penstock.workers.guard import GroupGuard
from penstock_reward.functions.registry import check_names
from penstock_reward.processes.in_flight import InFlight
from penstock_reward.processes.messages import Call, CallBatch, Outcome, Start
from penstock_reward.processes.process import WorkerProcess

log = logging.getLogger(__name__)

MAX_LOST_JOBS = 3  # a process may be lost while idle (out of memory); a job that loses this many is at fault
MAX_RESTARTS = 5  # of one slot in a row: functions that loaded at start and no longer do
RESTART_SECONDS = 0.5  # before the first of them, doubled each time


OnOutcome = Callable[[Call, Outcome], None]


@dataclass(frozen=True, order=True)
class _Job:
    """turn: its order among those that wait. on_outcome: gets each outcome at once, until `outcomes` is cancelled."""

    turn: tuple[bool, int]
    batch: CallBatch = field(compare=False)
    on_outcome: OnOutcome = field(compare=False)
    outcomes: "asyncio.Future[list[Outcome]]" = field(compare=False)

    def ended(self, call: Call, outcome: Outcome) -> None:
        if not self.outcomes.done():
            self.on_outcome(call, outcome)


class Pool:
    """Runs calls of reward functions. Made by `open_pool`."""

    def __init__(self, section: RewardSection) -> None:
        self._section = section
        self._start = Start(
            tuple(name for name in section.functions if name != ENVIRONMENT_REWARD), modules_path(section)
        )
        self._jobs: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue()
        self._turns = count()
        self.in_flight = InFlight()
        self._num_started = 0
        self._all_started = asyncio.Event()
        self.num_ready = 0
        self.num_idle = 0
        self.descriptions: dict[str, str] = {}

    def not_ready(self) -> str | None:
        """The reason why no call can run now; None if one can."""
        return (
            None if self.num_ready else f"0 of {self._section.num_workers} reward workers have loaded their functions"
        )

    async def wait_started(self) -> None:
        """Return when every slot has its first process."""
        await self._all_started.wait()

    async def run(
        self,
        prompt: str,
        completions: Sequence[str],
        answer: str,
        metadata: dict[str, Any],
        calls: Sequence[Call],
        *,
        on_outcome: OnOutcome = lambda call, outcome: None,
        is_test: bool = False,
    ) -> list[Outcome]:
        """One outcome per call, in order. RewardError if the arguments cannot be packed.

        on_outcome: gets each outcome as soon as it is known. is_test: the calls show whether a function works, and come
        before all others that wait. A caller that is cancelled gives up the calls that have not begun.
        """
        try:
            whole = CallBatch(prompt, tuple(completions), answer, msgspec.msgpack.encode(metadata), tuple(calls))
            frame(whole)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RewardError(
                f"prompt, completions or metadata cannot be packed: {error}; expected plain JSON"
            ) from None
        parts = split(calls, max(1, self.num_idle))
        with self.in_flight.asked(calls) as answered:

            def ended(call: Call, outcome: Outcome) -> None:
                answered(call)
                on_outcome(call, outcome)

            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run_part(whole, part, ended, is_test)) for part in parts]
        return [outcome for task in tasks for outcome in task.result()]

    async def _run_part(
        self, whole: CallBatch, calls: tuple[Call, ...], on_outcome: OnOutcome, is_test: bool
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        num_lost = 0
        while len(outcomes) < len(calls):
            batch = msgspec.structs.replace(whole, calls=calls[len(outcomes) :])
            job = _Job((not is_test, next(self._turns)), batch, on_outcome, asyncio.get_running_loop().create_future())
            self._jobs.put_nowait(job)
            some = await job.outcomes
            outcomes += some
            num_lost = 0 if some else num_lost + 1
            if num_lost == MAX_LOST_JOBS:
                reason = f"{num_lost} worker processes were lost before the call began; their output is in the log"
                on_outcome(calls[len(outcomes)], lost := Outcome(None, 0.0, "died", reason))
                outcomes.append(lost)
                num_lost = 0
        return outcomes

    async def serve_slot(self, guard: GroupGuard) -> None:
        """Keep one process and give it jobs, without end. RewardError if it cannot be started."""
        await self._serve_process(guard, self._note_started)
        failures = 0
        while True:
            try:
                await self._serve_process(guard, lambda: None)
                failures = 0
            except RewardError as error:
                failures += 1
                if failures > MAX_RESTARTS:
                    raise
                log.warning("a reward worker cannot be replaced (attempt %d of %d): %s", failures, MAX_RESTARTS, error)
                await asyncio.sleep(RESTART_SECONDS * 2 ** (failures - 1))

    async def _serve_process(self, guard: GroupGuard, on_started: Callable[[], None]) -> None:
        """Start a process and give it jobs until it is lost."""
        process = WorkerProcess(self._section.timeout_seconds, guard)
        try:
            self.descriptions = await process.start(self._start)
            on_started()
            await self._serve_jobs(process)
        finally:
            await process.close()

    def _note_started(self) -> None:
        self._num_started += 1
        if self._num_started == self._section.num_workers:
            self._all_started.set()

    async def _serve_jobs(self, process: WorkerProcess) -> None:
        """Give it jobs until the process is lost."""
        self.num_ready += 1
        try:
            while process.usable:
                self.num_idle += 1
                try:
                    job = await self._jobs.get()
                finally:
                    self.num_idle -= 1
                if job.outcomes.cancelled():
                    continue
                outcomes = await process.run(job.batch, self.in_flight, job.ended)
                if not job.outcomes.done():
                    job.outcomes.set_result(outcomes)
        finally:
            self.num_ready -= 1


@asynccontextmanager
async def open_pool(section: RewardSection) -> AsyncIterator[Pool]:
    """A pool whose functions are loaded; RewardError naming reward.functions if one cannot be."""
    check_names(section.functions, section.modules_path)
    pool = Pool(section)
    try:
        with GroupGuard() as guard:
            async with asyncio.TaskGroup() as slots:
                tasks = [slots.create_task(pool.serve_slot(guard)) for _ in range(section.num_workers)]
                await pool.wait_started()
                try:
                    yield pool
                finally:
                    for task in tasks:
                        task.cancel()
    except BaseExceptionGroup as errors:
        raise _first(errors) from None


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error inside nested groups: the one that ended the rest."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def modules_path(section: RewardSection) -> str:
    """The folder of the user's modules, as an absolute path; empty if all functions are built in."""
    if not any(":" in name for name in section.functions):
        return ""
    folder = Path(section.modules_path).resolve()
    if not folder.is_dir():
        raise RewardError(
            f"reward.modules_path is {section.modules_path!r}; expected an existing folder; "
            f"{looked_for(section.modules_path)}"
        )
    return str(folder)


def split(calls: Sequence[Call], num_parts: int) -> list[tuple[Call, ...]]:
    """Calls in at most `num_parts` runs of nearly equal length, in order."""
    size = max(1, -(-len(calls) // max(1, num_parts)))
    return [tuple(calls[first : first + size]) for first in range(0, len(calls), size)]

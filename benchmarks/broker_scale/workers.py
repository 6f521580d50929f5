"""Rollout and reward workers without engines, many in one process, on the real queue.

Owns what such a worker does: it takes, holds for as long as a generation lasts, and hands over, as the services do.
Each has its own connections and heartbeat, so that the server sees what it would see of as many services.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from benchmarks.data_plane_group import POLICY, Shape
from penstock.broker import Delivery, Served, Stage, Worker, connect
from penstock.config import Config
from penstock.contracts import ServiceKind, Ticket, decode
from penstock.contracts.stored_groups import RolloutHeader

CONNECT_AT_ONCE = 50
WAIT_SECONDS = 1.0  # as in the reward service
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Crowd:
    """Workers of one kind in one process."""

    config: Config
    shape: Shape
    kind: ServiceKind
    count: int
    room: int
    """Groups that one worker holds at once."""
    hold_seconds: float
    lease: int


class CrowdProcess:
    """A process that runs a crowd until `stop`, and then tells the seconds that each `take` lasted."""

    def __init__(self, crowd: Crowd) -> None:
        context = multiprocessing.get_context("spawn")
        self._own, other = context.Pipe()
        self._process = context.Process(target=_run, args=(crowd, other), daemon=True)
        self._process.start()
        other.close()

    def wait_ready(self) -> None:
        """Return once all its workers have connected and beat."""
        self._own.recv()

    def take_seconds(self) -> list[float]:
        """Those since the last call."""
        self._own.send("seconds")
        return list(self._own.recv())

    def stop(self) -> None:
        self._own.send("stop")
        self._process.join()


def _run(crowd: Crowd, pipe: Connection) -> None:
    asyncio.run(_work(crowd, pipe))


async def _work(crowd: Crowd, pipe: Connection) -> None:
    seconds: list[float] = []
    connecting = asyncio.Semaphore(CONNECT_AT_ONCE)

    async def one(number: int, ready: Callable[[], None]) -> None:
        async with connecting:
            queue = await connect(crowd.config, crowd.kind)
        member = _Member(crowd, Worker(queue, f"{crowd.kind}{number}", crowd.config.staleness), seconds)
        await member.look()
        ready()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(member.worker.keep_alive())
            tasks.create_task(member.work(tasks))

    num_ready, all_ready = 0, asyncio.Event()

    def ready() -> None:
        nonlocal num_ready
        num_ready += 1
        if num_ready == crowd.count:
            all_ready.set()

    async with asyncio.TaskGroup() as tasks:
        members = [tasks.create_task(one(number, ready)) for number in range(crowd.count)]
        await all_ready.wait()
        pipe.send("ready")
        while await asyncio.to_thread(pipe.recv) == "seconds":
            pipe.send(seconds[:])
            seconds.clear()
        for member in members:
            member.cancel()


class _Member:
    """One worker: takes while it has room, as the rollout service's producer does."""

    def __init__(self, crowd: Crowd, worker: Worker, seconds: list[float]) -> None:
        self._crowd, self.worker, self._seconds = crowd, worker, seconds
        rolls_out = crowd.kind is ServiceKind.ROLLOUT
        self._from, self._to = (Stage.TICKETS, Stage.ROLLOUTS) if rolls_out else (Stage.ROLLOUTS, Stage.SCORED)
        self._served = Served(POLICY, crowd.lease) if rolls_out else None
        self._room = asyncio.Semaphore(crowd.room)

    async def work(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._room.acquire()
            while (delivery := await self.look()) is None:
                seconds = self.worker.ask_seconds if self._from is Stage.TICKETS else WAIT_SECONDS
                await self.worker.wait(timeout_seconds=seconds)
            tasks.create_task(self._hold(delivery))

    async def look(self) -> Delivery | None:
        return await self._timed(self.worker.take(self._from, served=self._served))

    async def _hold(self, delivery: Delivery) -> None:
        following: Delivery | None = delivery
        while following is not None:
            await asyncio.sleep(self._crowd.hold_seconds)
            if self._served is not None:
                message: Any = self._crowd.shape.rollout(decode(following.payload, Ticket))
            else:
                message = self._crowd.shape.scored(decode(following.payload, RolloutHeader))
            _, following = await self._timed(
                self.worker.hand_over_and_take(following, message, self._to, self._from, served=self._served)
            )
        self._room.release()

    async def _timed(self, call: Awaitable[Answer]) -> Answer:
        start = time.perf_counter()
        answer = await call
        self._seconds.append(time.perf_counter() - start)
        return answer

"""Measures what the queue's server pays for each group, and for workers that wait, by the number of rollout workers.

Owns the load and the table. Invariant: groups flow at the same rate with any number of workers, so that whatever grows
in the table is the price of the workers themselves; every ticket that was issued is committed once. Real workers
(`workers.py`) and the trainer's own queue, without engines, rewards or files. The figures of the server are CPU
seconds, which other work on the machine hardly changes; the milliseconds of a call need a quiet one.

    .venv/bin/python -m benchmarks.broker_scale                      # five minutes
    .venv/bin/python -m benchmarks.broker_scale --workers 16 64
"""

import argparse
import asyncio
import resource
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.broker_scale.workers import Crowd, CrowdProcess
from benchmarks.data_plane_group import POLICY, Shape
from penstock.broker import Stage, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import ServiceKind, decode
from penstock.contracts.ledger import StepRecord
from penstock.contracts.services import Announcement
from penstock.contracts.stored_groups import ScoredHeader

BATCH_SIZE = 64
NUM_REWARD_WORKERS = 8
NUM_PROCESSES = 2  # of rollout workers
ROOM = 32
HOLD_SECONDS = 8.0  # a generation
OPEN_FILES = 65536
COLUMNS = (
    *("Workers", "Server idle, % of a core", "Server busy, %", "Groups /s", "Server's us a group"),
    *("take ms, p50", "p99", "Lost", "Twice"),
)


@dataclass(frozen=True)
class Figures:
    """What one number of workers costs."""

    num_workers: int
    idle_share: float
    """Of a core, while all workers wait and nothing moves."""
    busy_share: float
    groups_per_second: float
    take_ms: tuple[float, float]
    """Median and 99th percentile."""
    num_lost: int
    num_twice: int

    @property
    def us_per_group(self) -> float:
        return 1e6 * self.busy_share / self.groups_per_second


class Trainer:
    """Issues a batch of tickets each second and commits every group that comes back."""

    def __init__(self, queue: TrainerQueue, shape: Shape, worker: Worker) -> None:
        self._queue, self._shape, self._worker = queue, shape, worker
        self.committed: Counter[int] = Counter()
        self.num_issued = 0
        self._num_steps = 0

    async def announce(self) -> None:
        await self._queue.issue([], Announcement(POLICY, "/weights", self._queue.lease.number))

    async def issue_for(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            numbers = range(self.num_issued, self.num_issued + BATCH_SIZE)
            self.num_issued = numbers.stop
            await self._queue.issue([self._shape.ticket(number) for number in numbers])
            await asyncio.sleep(1.0)

    async def commit_all(self) -> None:
        """For ever: takes scored groups and commits those that have come."""
        while True:
            deliveries = await self._worker.take_several(Stage.SCORED, BATCH_SIZE)
            if not deliveries:
                await self._worker.wait(timeout_seconds=1.0)
                continue
            held = {decode(each.payload, ScoredHeader).group.ticket.number: each for each in deliveries}
            record = StepRecord(self._num_steps, tuple(held), f"{self._num_steps:08d}.1.pack", "0" * 16)
            await self._queue.commit_step(record, held)
            await self._queue.issue([], Announcement(POLICY, "/weights", self._queue.lease.number), list(held))
            self._num_steps += 1
            self.committed.update(list(held))
            for each in deliveries:
                self._worker.forget(each)


async def measure(server: EmbeddedServer, num_workers: int, arguments: argparse.Namespace) -> Figures:
    config = Config.model_validate(
        {
            "run": {"name": f"scale-{num_workers}"},
            "actor": {"path": "unused"},
            "data": {"train": {"path": "unused"}},
            "redis": {"url": server.url, "password": server.password},
        }
    )
    assert server.process is not None
    process, shape = psutil.Process(server.process.pid), Shape(2, 64)
    queue = await connect(config)
    lease = await acquire_lease(queue, config)
    lease.start_renewing(print)
    trainer = Trainer(TrainerQueue(queue, lease), shape, Worker(queue, "trainer", config.staleness))
    await trainer.announce()
    shares = [num_workers // NUM_PROCESSES] * (NUM_PROCESSES - 1)
    shares.append(num_workers - sum(shares))
    crowds = [
        CrowdProcess(Crowd(config, shape, ServiceKind.ROLLOUT, share, ROOM, HOLD_SECONDS, lease.number))
        for share in shares
    ]
    crowds.append(CrowdProcess(Crowd(config, shape, ServiceKind.REWARD, NUM_REWARD_WORKERS, ROOM, 0.0, lease.number)))
    try:
        for crowd in crowds:
            await asyncio.to_thread(crowd.wait_ready)
        await asyncio.sleep(2.0)
        idle_share = await cpu_share(process, arguments.idle_seconds)
        async with asyncio.TaskGroup() as tasks:
            committing = tasks.create_task(trainer.commit_all())
            await trainer.issue_for(HOLD_SECONDS + 2)  # until as many come back as are issued
            for crowd in crowds:
                await asyncio.to_thread(crowd.take_seconds)
            before, start = sum(trainer.committed.values()), time.perf_counter()
            issuing = tasks.create_task(trainer.issue_for(arguments.seconds))
            busy_share = await cpu_share(process, arguments.seconds)
            rate = (sum(trainer.committed.values()) - before) / (time.perf_counter() - start)
            await issuing
            taken = [seconds for crowd in crowds[:-1] for seconds in await asyncio.to_thread(crowd.take_seconds)]
            await drained(trainer)
            committing.cancel()
    finally:
        for crowd in crowds:
            await asyncio.to_thread(crowd.stop)
        await asyncio.to_thread(lease.release)
        await queue.delete_run()
        await queue.close()
    twice = sum(times > 1 for times in trainer.committed.values())
    ordered = sorted(taken)
    p50, p99 = (1000 * ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
    lost = trainer.num_issued - len(trainer.committed)
    return Figures(num_workers, idle_share, busy_share, rate, (p50, p99), lost, twice)


async def cpu_share(process: psutil.Process, seconds: float) -> float:
    """The share of a core that a process uses, from now on."""
    before, start = process.cpu_times(), time.perf_counter()
    await asyncio.sleep(seconds)
    after, end = process.cpu_times(), time.perf_counter()
    return float(after.user + after.system - before.user - before.system) / (end - start)


async def drained(trainer: Trainer) -> None:
    """Wait until every ticket is committed; give up after a minute without progress: it is counted as lost."""
    last, since = -1, time.perf_counter()
    while len(trainer.committed) < trainer.num_issued and time.perf_counter() - since < 60:
        if len(trainer.committed) != last:
            last, since = len(trainer.committed), time.perf_counter()
        await asyncio.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64, 256, 1000], help="of rollout")
    parser.add_argument("--seconds", type=float, default=30.0, help="that groups move for, after a start")
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(OPEN_FILES, hard), hard))
    print(f"| {' | '.join(COLUMNS)} |")
    print("| ---: " * len(COLUMNS) + "|")
    for number in arguments.workers:
        with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
            each = asyncio.run(measure(server, number, arguments))
        print(
            f"| {each.num_workers} | {100 * each.idle_share:.1f} | {100 * each.busy_share:.1f} "
            f"| {each.groups_per_second:.0f} | {each.us_per_group:.0f} | {each.take_ms[0]:.1f} | {each.take_ms[1]:.1f} "
            f"| {each.num_lost} | {each.num_twice} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

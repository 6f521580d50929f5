"""Measures what the queue adds to a group on its way: tickets -> rollouts -> scored -> committed.

Owns the load and the table. The yardstick is plain XADD of the same payload over as many connections: the header, the
completions and the texts of one group, as one message. Invariant: pipeline and yardstick run in turns against one
server, so that both see the same machine. An older yardstick is measured too: it sends two messages in turn, the group
with its texts and without. Both sides are one client process, without an engine, a reward function or step files. Start
it alone on a quiet machine, from the repository's root:

    .venv/bin/python -m benchmarks.data_plane                      # a minute
    .venv/bin/python -m benchmarks.data_plane --groups 100000      # is memory flat?
"""

import argparse
import asyncio
import resource
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import psutil

from benchmarks.data_plane_group import POLICY, Shape, bytes_per_token
from penstock.broker import Delivery, Queue, Served, Stage, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import Ticket, decode, encode
from penstock.contracts.ledger import StepRecord
from penstock.contracts.services import Announcement
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader, scored_group, stored, texts_of

BATCH_SIZE = 64
CREDITS = 4 * BATCH_SIZE
TAKEN_AT_ONCE = 8  # like the trainer
MEMORY_SAMPLES = 20
RAW_KEPT = 64  # entries of plain XADD that stay, about as many as the pipeline holds


@dataclass
class Memory:
    """Samples over a run: bytes of the server (used_memory) and of this process (resident)."""

    server: list[int] = field(default_factory=list)
    client: list[int] = field(default_factory=list)

    async def sample(self, queue: Queue) -> None:
        self.server.append(int((await queue.client.info("memory"))["used_memory"]))
        self.client.append(psutil.Process().memory_info().rss)

    def show(self) -> None:
        for name, samples in (("server", self.server), ("client", self.client)):
            quarter = max(1, len(samples) // 4)
            first, last = (median(each) / 2**20 for each in (samples[:quarter], samples[-quarter:]))
            peak = max(samples) / 2**20
            print(f"memory of the {name}: first quarter {first:.1f} MiB, last {last:.1f}, peak {peak:.1f}")


class Pipeline:
    """Moves groups through the three hand-overs, with `num_workers` workers of each kind."""

    def __init__(self, config: Config, shape: Shape, num_workers: int) -> None:
        self._config, self._shape, self._num_workers = config, shape, num_workers
        self.memory = Memory()
        self._lease = 0

    async def move(self, num_groups: int, max_outstanding: int = CREDITS) -> float:
        """Seconds from the first ticket to the last commit."""
        queues = [await connect(self._config) for _ in range(2 * self._num_workers + 1)]
        trainer_queue, rollouts, rewards = queues[0], queues[1 : self._num_workers + 1], queues[self._num_workers + 1 :]
        lease = await acquire_lease(trainer_queue, self._config)
        trainer, self._lease = TrainerQueue(trainer_queue, lease), lease.number
        lease.start_renewing(print)
        start = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                others = [tasks.create_task(self._roll_out(queue)) for queue in rollouts]
                others += [tasks.create_task(self._score(queue)) for queue in rewards]
                await self._train(trainer, num_groups, max_outstanding)
                seconds = time.perf_counter() - start
                for task in others:
                    task.cancel()
        finally:
            await asyncio.to_thread(lease.release)
            await trainer_queue.delete_run()
            for queue in queues:
                await queue.close()
        return seconds

    def _worker(self, queue: Queue, name: str) -> Worker:
        return Worker(queue, name, self._config.staleness)

    async def _roll_out(self, queue: Queue) -> None:
        worker = self._worker(queue, "rollout")
        served = Served(POLICY, self._lease)
        delivery = await worker.take(Stage.TICKETS, served=served)
        while True:
            if delivery is None:
                await worker.wait(timeout_seconds=1)
                delivery = await worker.take(Stage.TICKETS, served=served)
                continue
            group = self._shape.rollout(decode(delivery.payload, Ticket))
            _, delivery = await worker.hand_over_and_take(delivery, group, Stage.ROLLOUTS, Stage.TICKETS, served=served)

    async def _score(self, queue: Queue) -> None:
        worker = self._worker(queue, "reward")
        delivery = await worker.take(Stage.ROLLOUTS)
        while True:
            if delivery is None:
                await worker.wait(timeout_seconds=1)
                delivery = await worker.take(Stage.ROLLOUTS)
                continue
            header = decode(delivery.payload, RolloutHeader)
            [parts] = await worker.read([delivery], Part.TEXTS)
            assert len(texts_of(header, parts[Part.TEXTS])) == self._shape.group_size
            _, delivery = await worker.hand_over_and_take(
                delivery, self._shape.scored(header), Stage.SCORED, Stage.ROLLOUTS
            )

    async def _train(self, trainer: TrainerQueue, num_groups: int, max_outstanding: int) -> None:
        worker = self._worker(trainer.queue, "trainer")
        announcement = Announcement(POLICY, "/weights", trainer.lease.number)
        issued = min(max_outstanding, num_groups)
        await trainer.issue([self._shape.ticket(number) for number in range(issued)], announcement)
        held: dict[int, Delivery] = {}
        done, step, batch_size = 0, 0, min(BATCH_SIZE, max_outstanding)
        sample_every = max(1, num_groups // MEMORY_SAMPLES)
        while done < num_groups:
            deliveries = await worker.take_several(Stage.SCORED, min(TAKEN_AT_ONCE, batch_size - len(held)))
            if not deliveries:
                await worker.wait(timeout_seconds=1)
            for delivery, parts in zip(deliveries, await worker.read(deliveries, *Part), strict=True):
                scored = scored_group(decode(delivery.payload, ScoredHeader), parts)
                held[scored.group.ticket.number] = delivery
                worker.forget(delivery)
            if len(held) < min(batch_size, num_groups - done):
                continue
            await trainer.commit_step(StepRecord(step, tuple(held), f"{step:08d}.1.pack", "0" * 16), held)
            if done // sample_every != (done + len(held)) // sample_every:
                await self.memory.sample(trainer.queue)
            done, step = done + len(held), step + 1
            numbers = range(issued, min(issued + len(held), num_groups))
            issued += len(numbers)
            await trainer.issue([self._shape.ticket(number) for number in numbers], announcement, list(held))
            held = {}


async def raw_seconds(config: Config, payloads: Sequence[bytes], num_calls: int, num_connections: int) -> float:
    """Seconds for `num_calls` plain XADDs of the payloads in turn; MAXLEN keeps the stream short."""
    queues = [await connect(config) for _ in range(num_connections)]
    left = islice(cycle(payloads), num_calls)

    async def add(queue: Queue) -> None:
        for payload in left:
            await queue.client.xadd(queue.keys.name("raw"), {"p": payload}, maxlen=RAW_KEPT, approximate=False)

    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for queue in queues:
            tasks.create_task(add(queue))
    seconds = time.perf_counter() - start
    await queues[0].delete_run()
    for queue in queues:
        await queue.close()
    return seconds


def configured(server: EmbeddedServer, name: str) -> Config:
    return Config.model_validate(
        {
            "run": {"name": name},
            "actor": {"path": "unused"},
            "data": {"train": {"path": "unused"}},
            "staleness": {"heartbeat_seconds": 600, "claim_idle_seconds": 600},
            "redis": {"url": server.url, "password": server.password},
        }
    )


@dataclass
class Cpu:
    """CPU seconds of this process and of the server, inside `counting` only."""

    server: psutil.Process
    client_seconds: float = 0.0
    server_seconds: float = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        before = self._now()
        yield
        after = self._now()
        self.client_seconds += after[0] - before[0]
        self.server_seconds += after[1] - before[1]

    def _now(self) -> tuple[float, float]:
        own, server = resource.getrusage(resource.RUSAGE_SELF), self.server.cpu_times()
        return own.ru_utime + own.ru_stime, server.user + server.system


@dataclass
class Load:
    """One of the things that are measured in turns: how to run it, its rates and its CPU time."""

    name: str
    run: Callable[[int], Awaitable[float]]
    cpu: Cpu
    rates: list[float] = field(default_factory=list)

    async def measure(self, count: int) -> None:
        with self.cpu.counting():
            seconds = await self.run(count)
        self.rates.append(count / seconds)

    def show(self, total: int) -> None:
        client, server = (1e6 * each / total for each in (self.cpu.client_seconds, self.cpu.server_seconds))
        print(f"{self.name:<26} {median(self.rates):8.0f} /s   CPU us: client {client:4.0f}, server {server:4.0f}")


async def measure(arguments: argparse.Namespace, server: EmbeddedServer) -> None:
    assert server.process is not None
    shape = Shape(arguments.group_size, arguments.tokens)
    pipeline = Pipeline(configured(server, "bench"), shape, arguments.workers)
    group = shape.rollout(shape.ticket(0))
    form = stored(group)
    full = [form.header + form.parts[Part.COMPLETIONS] + form.parts[Part.TEXTS]]
    older = [encode(group), encode(group.without_text())]
    raw_config, num_connections = configured(server, "raw"), 2 * arguments.workers + 1
    process = psutil.Process(server.process.pid)
    raw, old, moved = (
        Load("plain XADD", lambda count: raw_seconds(raw_config, full, count, num_connections), Cpu(process)),
        Load("plain XADD, older", lambda count: raw_seconds(raw_config, older, count, num_connections), Cpu(process)),
        Load("three hand-overs", pipeline.move, Cpu(process)),
    )
    per_repeat = arguments.groups // arguments.repeats
    for repeat in range(arguments.repeats):
        for load in (raw, moved, old):
            await load.measure(per_repeat)
        shown = ", ".join(f"{load.name} {load.rates[-1]:.0f}/s" for load in (raw, old, moved))
        print(f"repeat {repeat}: {shown}", flush=True)
    alone = await Pipeline(configured(server, "alone"), shape, 1).move(100, max_outstanding=1) / 100
    print(f"\n{arguments.groups} groups of {shape.group_size} x {shape.num_tokens} tokens")
    for load in (raw, old, moved):
        load.show(per_repeat * arguments.repeats)
    for load in (raw, old):
        ratios = [ours / theirs for ours, theirs in zip(moved.rates, load.rates, strict=True)]
        print(f"share of {load.name:<18} {median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"tokens                     {median(moved.rates) * shape.total_tokens:,.0f} /s")
    print(f"added to a group, alone    {1000 * alone:8.2f} ms")
    for name, value in bytes_per_token(shape).items():
        print(f"bytes per token, {name:<30}{value:6.2f}")
    pipeline.memory.show()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=4, help="number of rollout workers, and of reward workers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        asyncio.run(measure(arguments, server))


if __name__ == "__main__":
    main()

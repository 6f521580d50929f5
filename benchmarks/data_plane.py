"""Measures what the queue adds to a group on its way: tickets -> rollouts -> scored -> committed.

Owns the load and the table. Invariant: the pipeline and its yardstick, plain XADD of the same two messages over as many
connections, run in turns against one server, so that both see the same machine. Both sides are one client process; no
engine, no reward and no step file takes part. Start it alone on a quiet machine, from the repository's root:

    .venv/bin/python -m benchmarks.data_plane                      # a minute
    .venv/bin/python -m benchmarks.data_plane --groups 100000      # is memory flat?
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import psutil

from penstock.broker import Announcement, Queue, Served, Stage, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    decode,
    encode,
    pack_float32,
    pack_int32,
)
from penstock.ledger import StepRecord

POLICY = PolicyIdentity(0, "0123456789abcdef")
PROMPT_TOKENS = 128
BATCH_SIZE = 8
CREDITS = 4 * BATCH_SIZE
CHARACTERS_PER_TOKEN = 4  # of English in common vocabularies
MEMORY_SAMPLES = 20
RAW_KEPT = 64  # entries of plain XADD that stay, about as many as the pipeline holds


@dataclass
class Shape:
    """One size of group: what a rollout server would have made."""

    group_size: int
    num_tokens: int
    completions: tuple[Completion, ...] = field(init=False)
    prompt_ids: bytes = field(init=False)

    def __post_init__(self) -> None:
        numbers = random.Random(0)
        self.prompt_ids = pack_int32(range(PROMPT_TOKENS))
        self.completions = tuple(self._completion(numbers) for _ in range(self.group_size))

    def _completion(self, numbers: random.Random) -> Completion:
        ids = pack_int32(numbers.randrange(150_000) for _ in range(self.num_tokens))
        logprobs = pack_float32(-numbers.random() for _ in range(self.num_tokens))
        text = "".join(numbers.choices("abcdefghijklmnop qrstuvwxyz\n", k=CHARACTERS_PER_TOKEN * self.num_tokens))
        span = VersionSpan(POLICY, 0, self.num_tokens)
        return Completion(ids, None, logprobs, (span,), text, "length")

    def ticket(self, number: int) -> Ticket:
        sampling = Sampling(1.0, self.num_tokens, (2,))
        seeds = tuple(range(self.group_size))
        return Ticket("train", number, 0, 0, "p" * 512, self.prompt_ids, seeds, sampling, "42", "", {})

    def rollout(self, ticket: Ticket) -> RolloutGroup:
        return RolloutGroup(ticket, self.completions, "http://127.0.0.1:30000", 1.0, 2.0)

    def scored(self, group: RolloutGroup) -> ScoredGroup:
        return ScoredGroup(group.without_text(), (Score(0.5),) * self.group_size)

    @property
    def total_tokens(self) -> int:
        return self.group_size * self.num_tokens


@dataclass
class Memory:
    """Bytes of the server (used_memory) and of this process (resident), over a run."""

    server: list[int] = field(default_factory=list)
    client: list[int] = field(default_factory=list)

    async def sample(self, queue: Queue) -> None:
        self.server.append(int((await queue.client.info("memory"))["used_memory"]))
        self.client.append(psutil.Process().memory_info().rss)


class Pipeline:
    """One run of the three hand-overs by workers of each kind."""

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
        served = Served(POLICY.number, self._lease)
        while True:
            delivery = await worker.take(Stage.TICKETS, served=served)
            if delivery is None:
                await worker.wait(Stage.TICKETS, timeout_seconds=1)
            while delivery is not None:
                group = self._shape.rollout(decode(delivery.payload, Ticket))
                _, delivery = await worker.hand_over_and_take(
                    delivery, group, Stage.ROLLOUTS, Stage.TICKETS, served=served
                )

    async def _score(self, queue: Queue) -> None:
        worker = self._worker(queue, "reward")
        while True:
            delivery = await worker.take(Stage.ROLLOUTS)
            if delivery is None:
                await worker.wait(Stage.ROLLOUTS, timeout_seconds=1)
            while delivery is not None:
                scored = self._shape.scored(decode(delivery.payload, RolloutGroup))
                _, delivery = await worker.hand_over_and_take(delivery, scored, Stage.SCORED, Stage.ROLLOUTS)

    async def _train(self, trainer: TrainerQueue, num_groups: int, max_outstanding: int) -> None:
        worker = self._worker(trainer.queue, "trainer")
        announcement = Announcement(POLICY, "/weights", trainer.lease.number)
        issued = min(max_outstanding, num_groups)
        await trainer.issue([self._shape.ticket(number) for number in range(issued)], announcement)
        held: dict[int, str] = {}
        done, step, batch_size = 0, 0, min(BATCH_SIZE, max_outstanding)
        sample_every = max(1, num_groups // MEMORY_SAMPLES)
        while done < num_groups:
            deliveries = await worker.take_several(Stage.SCORED, batch_size - len(held))
            if not deliveries:
                await worker.wait(Stage.SCORED, timeout_seconds=1)
            for delivery in deliveries:
                held[decode(delivery.payload, ScoredGroup).group.ticket.number] = delivery.entry_id
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
    """Seconds of so many calls of plain XADD, of the messages in turn, MAXLEN keeping the stream short."""
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


def bytes_per_token(shape: Shape) -> dict[str, float]:
    """Of each message, by stream; and of a rollout without its text, which reward functions need."""
    ticket = shape.ticket(0)
    group = shape.rollout(ticket)
    messages = {"tickets": ticket, "rollouts": group, "scored": shape.scored(group)}
    found = {name: len(encode(message)) / shape.total_tokens for name, message in messages.items()}
    text = sum(len(each.text.encode()) for each in shape.completions)
    return found | {"rollouts without text": found["rollouts"] - text / shape.total_tokens}


async def measure(arguments: argparse.Namespace, server: EmbeddedServer) -> None:
    shape = Shape(arguments.group_size, arguments.tokens)
    pipeline = Pipeline(configured(server, "bench"), shape, arguments.workers)
    group = shape.rollout(shape.ticket(0))
    payloads = [encode(group), encode(shape.scored(group))]
    raw_config, num_connections = configured(server, "raw"), 2 * arguments.workers + 1
    per_repeat = arguments.groups // arguments.repeats
    moved, raw = [], []
    for repeat in range(arguments.repeats):
        raw.append(per_repeat / await raw_seconds(raw_config, payloads, per_repeat, num_connections))
        moved.append(per_repeat / await pipeline.move(per_repeat))
        print(f"repeat {repeat}: plain XADD {raw[-1]:.0f}/s, three hand-overs {moved[-1]:.0f} groups/s", flush=True)
    alone = await Pipeline(configured(server, "alone"), shape, 1).move(100, max_outstanding=1) / 100
    show(arguments, moved, raw, alone, shape, pipeline.memory)


def show(
    arguments: argparse.Namespace,
    moved: list[float],
    raw: list[float],
    alone: float,
    shape: Shape,
    memory: Memory,
) -> None:
    ratios = [ours / theirs for ours, theirs in zip(moved, raw, strict=True)]
    print(f"\n{arguments.groups} groups of {shape.group_size} x {shape.num_tokens} tokens")
    print(f"plain XADD                 {median(raw):8.0f} /s")
    print(
        f"three hand-overs           {median(moved):8.0f} groups/s = {median(moved) * shape.total_tokens:,.0f} tokens/s"
    )
    print(f"share of plain XADD        {median(ratios):8.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"added to a group, alone    {1000 * alone:8.2f} ms")
    for name, value in bytes_per_token(shape).items():
        print(f"bytes per token, {name:<20}{value:6.2f}")
    scale: Callable[[int], float] = lambda value: value / 2**20  # noqa: E731
    for name, samples in (("server", memory.server), ("client", memory.client)):
        quarter = max(1, len(samples) // 4)
        first, last = scale(int(median(samples[:quarter]))), scale(int(median(samples[-quarter:])))
        print(f"memory of the {name}: first quarter {first:.1f} MiB, last {last:.1f}, peak {scale(max(samples)):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--groups", type=int, default=3000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=4, help="rollout servers, and as many reward workers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder)) as server:
        asyncio.run(measure(arguments, server))


if __name__ == "__main__":
    main()

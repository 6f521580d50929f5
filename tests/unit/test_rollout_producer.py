"""The loop from tickets to groups, against a fake engine and an in-memory queue."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from penstock.broker import Announcement, Delivery, Stage
from penstock.config import Config
from penstock.contracts import Contract, PolicyIdentity, RolloutGroup, Sampling, Ticket, encode, pack_int32
from penstock_rollout.engine.client import EngineClient
from penstock_rollout.engine.engine import Engine
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.producer import Producer
from penstock_rollout.weights import Weights
from tests.unit.test_rollout_fake_engine import FakeServer, FakeSGLang, serving, stage_weights

G = 2


class MemoryQueue:
    """The queue as one producer sees it. What is given back is free again."""

    def __init__(self) -> None:
        self.waiting: dict[Stage, list[Delivery]] = {Stage.TICKETS: [], Stage.EVAL: []}
        self.announced: Announcement | None = None
        self.published: list[RolloutGroup] = []
        self.returned: list[tuple[str, str]] = []
        self.buried: list[str] = []
        self.taken: list[str] = []
        self.changed = asyncio.Event()

    def put(self, ticket: Ticket, **fields: Any) -> None:
        stage = Stage.TICKETS if ticket.purpose == "train" else Stage.EVAL
        fields = {"payload": encode(ticket), "reason": "", "failures": 0, "engine_deaths": 0, **fields}
        self.waiting[stage].append(Delivery(stage, ticket.key, ticket.key, 0, **fields))
        self.changed.set()

    async def announcement(self) -> Announcement | None:
        return self.announced

    async def take(self, stage: Stage, held_version: int | None = None) -> Delivery | None:
        assert self.announced is not None
        if held_version is None or held_version < self.announced.identity.number or not self.waiting[stage]:
            return None
        delivery = self.waiting[stage].pop(0)
        self.taken.append(delivery.ticket_key)
        return delivery

    async def wait(self, *stages: Stage, timeout_seconds: float) -> None:
        self.changed.clear()
        try:
            await asyncio.wait_for(self.changed.wait(), min(timeout_seconds, 0.05))
        except TimeoutError:
            return

    async def hand_over(self, delivery: Delivery, message: Contract, to: Stage) -> bool:
        assert isinstance(message, RolloutGroup)
        assert to == Stage.ROLLOUTS
        self.published.append(message)
        return True

    async def give_back(
        self, delivery: Delivery, *, failed: bool = False, engine_died: bool = False, reason: str = ""
    ) -> None:
        self.returned.append((delivery.ticket_key, "failed" if failed else "engine_died" if engine_died else "free"))
        changed = replace(
            delivery, failures=delivery.failures + failed, engine_deaths=delivery.engine_deaths + engine_died
        )
        if changed.failures + changed.engine_deaths < 3:
            self.waiting[delivery.stage].append(changed)

    async def bury(self, delivery: Delivery, reason: str) -> None:
        self.buried.append(reason)


def ticket(number: int, purpose: Any = "train", tokens: int = 3, prompt: tuple[int, ...] = (1, 2)) -> Ticket:
    return Ticket(
        purpose=purpose,
        number=number,
        attempt=0,
        policy_version=1,
        prompt="",
        prompt_ids=pack_int32(prompt),
        seeds=tuple(range(number * G, number * G + G)),
        sampling=Sampling(1.0, tokens, ()),
        answer="",
        reward="",
        metadata={},
    )


@dataclass
class Bench:
    fake: FakeSGLang
    server: FakeServer
    queue: MemoryQueue
    weights: Weights
    metrics: RolloutMetrics
    root: Path
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def announce(self, version: int, lease: int = 1) -> None:
        path, digest = stage_weights(self.root / str(lease), version)
        self.queue.announced = Announcement(PolicyIdentity(version, digest), path, lease)

    def groups(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("penstock_rollout_groups_total", {"outcome": outcome}) or 0

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def as_it_is(announced: Announcement, needs_whole: bool) -> Announcement:
    return announced


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    config = Config.model_validate(
        {
            "actor": {"path": "unused", "group_size": G},
            "data": {"train": {"path": "unused"}},
            "rollout": {"engine": {"max_running_requests": 4 * G, "request_timeout_seconds": 5}},
        }
    )
    fake, queue = FakeSGLang(), MemoryQueue()
    async with serving(fake) as url:
        server = FakeServer(fake, url)
        engine = Engine(server, EngineClient(config.rollout.engine))
        metrics = RolloutMetrics()
        weights = Weights(engine, config.weights, metrics)
        bench = Bench(fake, server, queue, weights, metrics, tmp_path)
        producer = Producer(queue, queue.announcement, engine, weights, as_it_is, metrics, config, "server")
        engine_stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(engine.keep_engine(engine_stop, weights.forget))
            producing = tasks.create_task(producer.produce_groups(bench.stop))
            yield bench
            fake.going_on.set()
            fake.token_seconds = 0
            bench.stop.set()
            await producing
            engine_stop.set()
        await engine.close()


async def test_tickets_become_groups_under_the_announced_weights(bench: Bench) -> None:
    for number in range(6):
        bench.queue.put(ticket(number))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.published) == 6)
    assert bench.queue.announced is not None
    for group in bench.queue.published:
        assert len(group.completions) == G
        assert group.server == "server"
        assert group.started_at <= group.ended_at
        assert {span.policy for each in group.completions for span in each.spans} == {bench.queue.announced.identity}
    assert bench.groups("published") == 6
    assert bench.metrics.registry.get_sample_value("penstock_rollout_completion_tokens_total") == 6 * G * 3
    assert bench.metrics.registry.get_sample_value("penstock_rollout_prompt_tokens_total") == 6 * 2


async def test_nothing_is_taken_before_a_version_is_announced(bench: Bench) -> None:
    bench.queue.put(ticket(0))
    await asyncio.sleep(0.2)
    assert bench.queue.taken == []


async def test_a_server_that_is_behind_loads_before_it_takes(bench: Bench) -> None:
    bench.announce(1)
    await bench.until(lambda: bench.weights.identity is not None)
    bench.announce(2)
    bench.queue.put(ticket(0))
    await bench.until(lambda: bench.queue.published)
    (group,) = bench.queue.published
    assert group.completions[0].oldest_version == 2


async def test_a_new_lease_is_followed_even_to_a_lower_version(bench: Bench) -> None:
    bench.announce(5)
    await bench.until(lambda: bench.weights.identity is not None)
    bench.announce(2, lease=2)
    bench.queue.put(ticket(0))
    await bench.until(lambda: bench.queue.published)
    assert bench.queue.published[0].completions[0].oldest_version == 2


async def test_no_more_completions_run_than_the_engine_holds(bench: Bench) -> None:
    bench.fake.token_seconds = 0.02
    for number in range(10):
        bench.queue.put(ticket(number))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.published) == 10)
    assert bench.fake.max_running == 4 * G


async def test_malformed_tickets_are_buried(bench: Bench) -> None:
    bench.queue.put(ticket(0), payload=b"not a ticket")
    bench.announce(1)
    await bench.until(lambda: bench.queue.buried)
    assert "not a Ticket" in bench.queue.buried[0]


async def test_what_the_engine_refuses_counts_as_failed(bench: Bench) -> None:
    bench.queue.put(ticket(0, tokens=1000))
    bench.queue.put(ticket(1))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.returned) == 3 and bench.queue.published)
    assert bench.queue.returned == [("0", "failed")] * 3
    assert [group.ticket.number for group in bench.queue.published] == [1]


async def test_aborted_completions_are_never_published(bench: Bench) -> None:
    bench.fake.finish_reason = "abort"
    bench.queue.put(ticket(0))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.returned) == 3)
    assert bench.queue.published == []
    assert bench.groups("aborted") == 3


async def test_a_dead_engine_is_restarted_with_the_announced_weights(bench: Bench) -> None:
    bench.fake.token_seconds = 1.0  # still running when it dies, on a busy machine too
    bench.queue.put(ticket(0))
    bench.queue.put(ticket(1))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_running == 2 * G)
    bench.server.die()
    bench.fake.token_seconds = 0
    await bench.until(lambda: len(bench.queue.published) == 2)
    assert sorted(bench.queue.returned) == [("0", "engine_died"), ("1", "engine_died")]
    assert bench.server.num_starts == 2
    assert bench.queue.published[0].completions[0].oldest_version == 1


async def test_a_ticket_that_two_engines_died_with_runs_alone(bench: Bench) -> None:
    bench.fake.token_seconds = 0.05
    bench.queue.put(ticket(0))
    bench.queue.put(ticket(1), engine_deaths=2)
    bench.queue.put(ticket(2))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.published) == 3)
    assert bench.fake.max_running == G
    assert [group.ticket.number for group in bench.queue.published] == [0, 1, 2]


async def test_evaluation_takes_its_share_and_all_when_nothing_else_waits(bench: Bench) -> None:
    bench.fake.token_seconds = 0.05
    for number in range(6):
        bench.queue.put(ticket(number))
        bench.queue.put(ticket(number, "eval"))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_running == 4 * G)
    assert sorted(bench.queue.taken) == ["0", "1", "2", "e0"]  # a quarter of four groups
    await bench.until(lambda: len(bench.queue.published) == 12)


async def test_at_the_end_what_runs_is_finished(bench: Bench) -> None:
    bench.fake.token_seconds = 0.05
    bench.queue.put(ticket(0))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_running)
    bench.stop.set()
    await bench.until(lambda: bench.queue.published)


async def test_at_the_end_what_takes_too_long_is_given_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_rollout.producer.DRAIN_SECONDS", 0.1)
    bench.fake.going_on.clear()
    bench.queue.put(ticket(0))
    bench.announce(1)
    bench.fake.token_seconds = 5
    await bench.until(lambda: bench.fake.num_running)
    bench.stop.set()
    await bench.until(lambda: bench.queue.returned)
    assert bench.queue.returned == [("0", "free")]


async def test_busy_time_counts_training_only() -> None:
    now = 0.0
    metrics = RolloutMetrics(clock=lambda: now)
    with metrics.running(training=True):
        now = 2.0
        with metrics.running(training=True):
            now = 3.0
    with metrics.running(training=False):
        now = 10.0
    assert metrics.registry.get_sample_value("penstock_rollout_generation_busy_seconds_total") == 3.0

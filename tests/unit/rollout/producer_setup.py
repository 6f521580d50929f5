"""A producer over a fake engine and an in-memory queue."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from penstock.broker import Delivery, Served, Stage
from penstock.config import Config, WeightsSection
from penstock.contracts import PolicyIdentity, RolloutGroup, Sampling, Ticket, encode, pack_int32
from penstock.contracts.canary import Canary
from penstock.contracts.services import Announcement
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.generator import Generator
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.producer import Producer
from penstock_rollout.weights.updater import WeightUpdater
from penstock_rollout.weights.version_order import is_behind
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.fake_model import prompt_logprobs
from tests.unit.rollout.test_fake_engine import FakeServer, FakeSGLang, serving, stage_weights

G = 2


class MemoryQueue:
    """The queue as one producer sees it; a ticket that is given back is free again."""

    def __init__(self) -> None:
        self.waiting: dict[Stage, list[Delivery]] = {Stage.TICKETS: [], Stage.EVAL: []}
        self.announced: Announcement | None = None
        self.num_announcements_read = 0
        self.published: list[RolloutGroup] = []
        self.returned: list[tuple[str, str]] = []
        self.reasons: list[str] = []
        self.buried: list[str] = []
        self.taken: list[str] = []
        self.num_asked_with_hand_over = self.followed = 0
        self.changed = asyncio.Event()
        self.ask_seconds = 0.05
        self.waits = asyncio.Event()
        self.refused = self.expects_wakeup = False

    def put(self, ticket: Ticket, **fields: Any) -> None:
        stage = Stage.TICKETS if ticket.purpose == "train" else Stage.EVAL
        fields = {"payload": encode(ticket), "reason": "", "failures": 0, "engine_deaths": 0, **fields}
        self.waiting[stage].append(Delivery(stage, ticket.key, ticket.key, 0, **fields))
        self.changed.set()

    async def announcement(self) -> Announcement | None:
        self.num_announcements_read += 1
        return self.announced

    async def take(self, *stages: Stage, served: Served | None = None, has_room: bool = False) -> Delivery | None:
        self.expects_wakeup = False
        self.refused = (
            served is None or self.announced is None or is_behind(served.identity, served.lease, self.announced)
        )
        if self.refused:
            return None
        for stage in stages:
            if self.waiting[stage]:
                delivery = self.waiting[stage].pop(0)
                self.taken.append(delivery.ticket_key)
                self.expects_wakeup = has_room and not any(self.waiting.values())
                return delivery
        self.expects_wakeup = True
        return None

    async def wait(self, *, timeout_seconds: float) -> None:
        self.changed.clear()
        self.waits.set()
        try:
            await asyncio.wait_for(self.changed.wait(), timeout_seconds)
        except TimeoutError:
            return

    async def hand_over(self, delivery: Delivery, message: RolloutGroup, to: Stage) -> bool:
        assert to == Stage.ROLLOUTS
        self.published.append(message)
        return True

    async def hand_over_and_take(
        self, delivery: Delivery, message: RolloutGroup, to: Stage, *stages: Stage, served: Served | None = None
    ) -> tuple[bool, Delivery | None]:
        await self.hand_over(delivery, message, to)
        self.num_asked_with_hand_over += 1
        expected = self.expects_wakeup
        following = await self.take(*stages, served=served)
        self.expects_wakeup = expected
        self.followed += following is not None
        return True, following

    async def give_back(
        self, delivery: Delivery, *, failed: bool = False, engine_died: bool = False, reason: str = ""
    ) -> None:
        self.returned.append((delivery.ticket_key, "failed" if failed else "engine_died" if engine_died else "free"))
        self.reasons.append(reason)
        changed = replace(
            delivery, failures=delivery.failures + failed, engine_deaths=delivery.engine_deaths + engine_died
        )
        if changed.failures + changed.engine_deaths < 3:
            self.waiting[delivery.stage].append(changed)

    async def bury(self, delivery: Delivery, reason: str) -> bool:
        self.buried.append(reason)
        return True


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
class Rollout:
    """A rollout service without its HTTP, over a fake engine and a queue in memory."""

    fake: FakeSGLang
    server: FakeServer
    queue: MemoryQueue
    weights: WeightUpdater
    producer: Producer
    metrics: RolloutMetrics
    root: Path
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    def announce(self, version: int, lease: int = 1, *, canary: bool = False) -> None:
        path, digest = stage_weights(self.root / str(lease), version)
        probe = Canary((5, 6), prompt_logprobs((5, 6), f"{version}-"), tolerance=0.01) if canary else None
        self.queue.announced = Announcement(PolicyIdentity(version, digest), path, lease, probe)

    def use(self, **section: Any) -> None:
        """Continue with other settings of weights."""
        self.weights._section = WeightsSection(**section)

    def groups(self, outcome: str) -> float:
        return self.metrics.registry.get_sample_value("penstock_rollout_groups_total", {"outcome": outcome}) or 0

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(ANSWER_SECONDS):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


async def as_it_is(announced: Announcement, needs_full: bool) -> Announcement:
    return announced


@contextlib.asynccontextmanager
async def producing_rollout(root: Path, **sections: Any) -> AsyncIterator[Rollout]:
    """A rollout service whose producer runs. `sections`: of the configuration."""
    config = Config.model_validate(
        {
            "actor": {"path": "unused", "group_size": G},
            "data": {"train": {"path": "unused"}},
            "rollout": {"engine": {"max_running_requests": 4 * G, "request_timeout_seconds": ANSWER_SECONDS}},
            **sections,
        }
    )
    fake, queue = FakeSGLang(), MemoryQueue()
    async with serving(fake) as url:
        server = FakeServer(fake, url)
        engine = Engine(server, SGLangClient(config.rollout.engine))
        metrics = RolloutMetrics()
        weights = WeightUpdater(engine, config.weights, metrics)
        generator = Generator(engine, weights, metrics)
        producer = Producer(queue, queue.announcement, engine, weights, generator, as_it_is, metrics, config, "server")
        rollout = Rollout(fake, server, queue, weights, producer, metrics, root)
        engine_stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(engine.keep_engine(engine_stop, weights.forget))
            producing = tasks.create_task(producer.produce_groups(rollout.stop))
            yield rollout
            fake.going_on.set()
            fake.holds_at, fake.token_seconds = -1, 0
            rollout.stop.set()
            await producing
            engine_stop.set()
        await engine.close()

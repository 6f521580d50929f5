"""A run whose trainer and engines share one GPU: a real queue, learner and HTTP; the engines are fakes.

`Gpu` records who uses its memory. A trainer or a server is killed by ending its tasks; its memory is free then, as that
of a process is, and its heartbeat or lease expires at once.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from penstock.broker import Queue, Stage, Worker
from penstock.broker.lease import acquire_lease
from penstock.config import Config
from penstock.contracts import Score, ServiceKind, decode
from penstock.contracts.services import ServiceRecord
from penstock.contracts.stored_groups import RolloutHeader, ScoredHeader
from penstock.runtime.service import Service
from penstock_rollout.admission import Admission
from penstock_rollout.app import make_rollout_app
from penstock_rollout.calls import Calls
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.generator import Generator
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.producer import Producer
from penstock_rollout.weights.snapshots import Snapshots
from penstock_rollout.weights.turns import TurnGate, Turns
from penstock_rollout.weights.updater import WeightUpdater
from tests.integration.broker.queue_setup import expire_lease
from tests.integration.trainer.consumer_setup import BATCH_SIZE
from tests.integration.trainer.loop_setup import Life, WatchedLearner
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.fake_model import VOCABULARY
from tests.unit.rollout.test_fake_engine import FakeServer, FakeSGLang, serving
from tests.unit.trainer.trainer_groups import SHAPE

G = 2
BEAT_SECONDS = 0.05
TRAINER = "trainer"


class Gpu:
    """Who uses the memory of the one GPU, in the order of events; `faults`: trainer and engines at once."""

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.faults: list[str] = []
        self.events: list[str] = []

    def use(self, name: str, uses: bool) -> None:
        if uses == (name in self.users):
            return
        self.events.append(f"{name} {'takes' if uses else 'leaves'}")
        (self.users.add if uses else self.users.discard)(name)
        if TRAINER in self.users and len(self.users) > 1:
            self.faults.append(f"{sorted(self.users)} after {self.events[-4:]}")


class MovingLearner(WatchedLearner):
    """Reports its moves."""

    gpu: Gpu
    beside = False

    def to_device(self) -> None:
        self.gpu.use(TRAINER, True)
        super().to_device()
        self.watch.saw("turn")

    def to_host(self) -> None:
        super().to_host()
        self.gpu.use(TRAINER, False)


class SharingLife(Life):
    """One life of a trainer that shares its GPU if the configuration says so."""

    gpu: Gpu

    def make_learner(self, config: Config) -> WatchedLearner:
        return MovingLearner(config, starts_on_host=config.trainer.take_turns)


class RolloutServer:
    """A rollout service in this process."""

    def __init__(self, name: str, config: Config, queue: Queue, gpu: Gpu, fake: FakeSGLang, url: str) -> None:
        self.name = name
        self.fake = fake
        self.server = FakeServer(fake, url)
        self._config, self._queue, self._gpu = config, queue, gpu
        fake.on_memory = lambda uses: gpu.use(name, uses)
        self._worker = Worker(queue, name, config.staleness)
        self.gate = TurnGate(queue.turn, self._register) if config.trainer.take_turns else None
        self.engine = Engine(self.server, SGLangClient(config.rollout.engine), gate=self.gate)
        self.metrics = RolloutMetrics()
        self.weights = WeightUpdater(self.engine, config.weights, self.metrics)
        files_of = Snapshots(queue, config.token, config.weights.push_timeout_seconds).files_of
        generator = Generator(self.engine, self.weights, self.metrics)
        self._calls = Calls(generator, self.weights, self.metrics, Admission(64, 64))
        self._producer = Producer(
            self._worker, queue.announced, self.engine, self.weights, generator, files_of, self.metrics, config, name
        )
        self._service = Service("127.0.0.1", 0, "rollout.port")
        self._tasks: list[asyncio.Task[None]] = []
        self._serving: list[asyncio.Task[None]] = []

    async def _register(self) -> None:
        weights = self.weights
        record = ServiceRecord(
            ServiceKind.ROLLOUT, self.name, self._service.url, 1, weights.state, weights.identity, self.engine.name
        )
        await self._queue.register(record, ANSWER_SECONDS)

    async def _announce(self) -> None:
        while True:
            await self._register()
            await asyncio.sleep(BEAT_SECONDS)

    def start(self) -> None:
        turns = None
        if self.gate is not None:
            load_announced = self._producer.load_announced
            turns = Turns(self._queue.turn, self.gate, self.engine, self.weights, load_announced)
        app = make_rollout_app(self.engine, self.weights, self._calls, self.metrics.registry, None, turns)
        stop = asyncio.Event()
        running = [
            self._announce(),
            self._worker.keep_alive(),
            self.engine.keep_engine(stop, self.weights.forget),
            self._producer.produce_groups(stop),
            *([turns.watch()] if turns else []),
        ]
        self._tasks = [asyncio.create_task(each) for each in running]
        self._serving = [asyncio.create_task(self._service.run(app, stopped=_until(self._service.stop)))]

    async def kill(self) -> None:
        """End it as SIGKILL does, with its engine; its heartbeat expires."""
        for task in self._tasks:
            task.cancel()
        self._service.stop.set()  # its socket must be closed before another has its number
        await asyncio.gather(*self._tasks, *self._serving, return_exceptions=True)
        await self.engine.close()
        self._gpu.use(self.name, False)
        await self._worker.retire()
        await self._queue.unregister(self.name)


class World:
    """One run: its servers, its trainers one after the other, and rewards that depend on the ticket alone."""

    def __init__(self, config: Config, queue: Queue) -> None:
        self.config = config
        self.queue = queue
        self.gpu = Gpu()
        self._stack = contextlib.AsyncExitStack()
        self.servers: list[RolloutServer] = []
        self.same_rewards = False
        self._rewarding: asyncio.Task[None] | None = None

    async def add_server(self, *, may_start: bool = True) -> RolloutServer:
        fake = FakeSGLang()
        if not may_start:
            fake.may_start.clear()
        url = await self._stack.enter_async_context(serving(fake))
        server = RolloutServer(f"rollout-{len(self.servers)}", self.config, self.queue, self.gpu, fake, url)
        self.servers.append(server)
        self._stack.push_async_callback(server.kill)
        server.start()
        return server

    @contextlib.asynccontextmanager
    async def trainer(self) -> AsyncIterator[tuple[SharingLife, "asyncio.Task[None]"]]:
        """A life of the trainer and its loop. If the loop has not ended by then, the end is that of SIGKILL."""
        lease = await acquire_lease(self.queue, self.config)
        life = SharingLife(self.config, self.queue, lease)
        assert isinstance(life.learner, MovingLearner)
        life.learner.gpu = self.gpu
        async with life.training() as training:
            yield life, training
        self.gpu.use(TRAINER, False)
        await expire_lease(self.queue)

    async def __aenter__(self) -> "World":
        self._rewarding = asyncio.create_task(self._score())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._rewarding is not None
        self._rewarding.cancel()
        await asyncio.gather(self._rewarding, return_exceptions=True)
        await self._stack.aclose()

    async def _score(self) -> None:
        worker = Worker(self.queue, "reward", self.config.staleness)
        while True:
            delivery = await worker.take(Stage.ROLLOUTS)
            if delivery is None:
                await worker.wait(timeout_seconds=1)
                continue
            group = decode(delivery.payload, RolloutHeader)
            scores = [
                Score(0.0 if self.same_rewards else float((group.ticket.number + index) % 2))
                for index in range(len(group.ticket.seeds))
            ]
            await worker.hand_over(delivery, ScoredHeader(group, tuple(scores)), Stage.SCORED)

    def check(self) -> None:
        """Nobody used the GPU beside the trainer, and no engine was asked for what it cannot do."""
        assert self.gpu.faults == []
        assert [each.fake.faults for each in self.servers] == [[]] * len(self.servers)


def sharing_config(given: Config, folder: Path, *, take_turns: bool, max_staleness: int, **changes: Any) -> Config:
    """A configuration of this world. `changes`: keys of `weights`."""
    document = given.model_dump()
    document["actor"] = {"path": str(folder / "model"), "dtype": "float32", "group_size": G}
    document["run"] |= {"root": str(folder), "max_steps": NUM_STEPS, "stall_seconds": ANSWER_SECONDS}
    document["data"]["batch_size"] = BATCH_SIZE
    document["sampling"] |= {"max_new_tokens": 4}
    document["staleness"] |= {"max_staleness": max_staleness}
    document["trainer"] |= {"take_turns": take_turns}
    document["optimizer"] |= {"lr": 1e-3}
    document["checkpoint"] |= {"every_steps": 2}
    document["rollout"]["engine"] |= {"dtype": "float32", "max_running_requests": 4 * G}
    document["weights"] |= {"push_timeout_seconds": ANSWER_SECONDS, "canary_tokens": 0, **changes}
    return Config.model_validate(document)


NUM_STEPS = 4


def save_model(folder: Path) -> None:
    """A tiny model with the vocabulary of the fake engine."""
    torch.manual_seed(7)
    shape = SHAPE | {"vocab_size": VOCABULARY}
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).save_pretrained(folder / "model")


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()

"""Rollout services without a queue, and the trainer's side that pushes to them.

Both sides are the product's own code: each server is a real SGLang behind the rollout service's HTTP, and the pushing
side is the trainer's transport and publisher.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from penstock.broker import Queue
from penstock.config import Config
from penstock.contracts import Dtype, ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.runtime.connections import max_connections
from penstock.runtime.service import Service
from penstock_rollout.app import make_rollout_app
from penstock_rollout.calls import Calls, make_admission
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.engine.sglang.server import StartedServer
from penstock_rollout.generator import Generator
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.updater import WeightUpdater
from penstock_trainer.weight_sync.choose import make_transport
from penstock_trainer.weight_sync.publisher import Publisher, Push
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weight_sync.transport import Transport
from penstock_trainer.weights.files import Weights as NamedWeights
from penstock_trainer.weights.files import published_weights
from penstock_trainer.weights.hugging_face import config_json

LOOPBACK = "http://127.0.0.1:0"


@dataclass
class RolloutServer:
    """One rollout service."""

    name: str
    url: str
    engine: Engine
    weights: WeightUpdater
    log_path: Path
    server: StartedServer

    @property
    def record(self) -> ServiceRecord:
        return ServiceRecord(ServiceKind.ROLLOUT, self.name, self.url, 0, self.weights.state, self.weights.identity)


@contextlib.asynccontextmanager
async def rollout_server(name: str, config: Config, folder: Path) -> AsyncIterator[RolloutServer]:
    """A rollout service that starts its own engine, with the model of actor.path."""
    section = config.rollout.engine
    log_path = folder / f"{name}.log"
    returns_experts = config.actor.router_replay
    server = StartedServer(section, config.actor.path, log_path, returns_experts=returns_experts)
    engine = Engine(server, SGLangClient(section, returns_experts=returns_experts))
    metrics = RolloutMetrics()
    weights = WeightUpdater(engine, config.weights, metrics)
    service = Service("127.0.0.1", 0, "rollout.port")
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(engine.keep_engine(stop, weights.forget))
        admission = make_admission(section.max_running_requests, max_connections())
        calls = Calls(Generator(engine, weights, metrics), weights, metrics, admission)
        app = make_rollout_app(engine, weights, calls, metrics.registry, config.token)
        tasks.create_task(service.run(app, until=_until(service.stop)))
        try:
            yield RolloutServer(name, service.url, engine, weights, log_path, server)
        finally:
            stop.set()
            service.stop.set()
    await engine.close()


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


class ModelSource:
    """The weights of a model, as a learner with one rank on `device` stages them."""

    def __init__(self, model: Any, device: str = "cpu") -> None:
        self.model, self.device = model, device

    def weights(self) -> NamedWeights:
        return published_weights(self.model)

    def config_json(self, dtype: Dtype) -> bytes:
        return config_json(self.model, dtype)

    @property
    def masters(self) -> dict[str, Tensor]:
        return dict(self.weights())


@dataclass
class Pusher:
    """The trainer's side of one transport."""

    transport: Transport
    publisher: Publisher
    servers: list[RolloutServer]
    lease: int
    version: int = 0
    announcement: Announcement | None = field(default=None)

    async def stage(self) -> Announcement:
        """Stage the present weights as the next version."""
        self.version += 1
        identity = await asyncio.to_thread(self.transport.stage, self.version, self.lease)
        path = str(self.transport.folder_of(self.version, self.lease))
        self.announcement = Announcement(identity, path, self.lease)
        return self.announcement

    async def push(self) -> Push:
        """Stage the present weights as the next version, and push it to all servers."""
        return await self.publisher.push(await self.stage())

    async def services(self) -> list[ServiceRecord]:
        """What a publisher reads from the queue."""
        return [server.record for server in self.servers]


@contextlib.asynccontextmanager
async def pusher(
    config: Config, source: ModelSource, servers: list[RolloutServer], folder: Path, *, lease: int
) -> AsyncIterator[Pusher]:
    """A pusher with the transport of `weights.transport`; each needs a higher lease than the one before."""
    client = RolloutClient(config)
    transport = make_transport(config, source, folder, client, LOOPBACK)
    made = Pusher(transport, cast(Publisher, None), servers, lease)
    made.publisher = Publisher(cast(Queue, made), client, transport, config.weights.push_timeout_seconds)
    try:
        yield made
    finally:
        transport.close()
        await client.close()

"""A rollout service that applies deltas: what its engine loads, and how a damaged chain is repaired over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr, ValidationError

from penstock.config import EngineSection, WeightsSection
from penstock.contracts import ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.runtime.service import Service
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.local_copy import ChainError
from penstock_rollout.weights.snapshots import Snapshots
from penstock_rollout.weights.updater import WeightUpdater
from penstock_trainer.app import trainer_app
from penstock_trainer.control import Requests
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.status import Status
from penstock_trainer.weight_sync.disk import DiskTransport
from penstock_trainer.weights.deltas import DELTA_NAME
from penstock_trainer.weights.files import WEIGHTS_NAME
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.test_fake_engine import FakeServer, FakeSGLang, serving
from tests.unit.rollout.weights.delta_world import World, flip

TOKEN = SecretStr("secret")
SECTION = WeightsSection(transport="disk", full_every=4)


@dataclass
class Run:
    """A trainer that stages deltas, and a rollout service that applies them."""

    world: World
    transport: DiskTransport
    fake: FakeSGLang
    weights: WeightUpdater
    snapshots: Snapshots

    def stage(self, version: int) -> Announcement:
        self.world.source.step()
        self.transport.stage(version, self.world.lease)
        return Announcement(
            self.world.staging.digest(version), str(self.transport.folder_of(version, self.world.lease)), 1
        )

    async def catch_up(self, announced: Announcement) -> None:
        """Load the announced version as the producer does."""
        await self.weights.update(await self.snapshots.files_of(announced, self.weights.needs_full))

    def loaded(self) -> bytes:
        """The file that the engine was last told to load."""
        paths = [body["model_path"] for path, body in self.fake.calls if path == "/update_weights_from_disk"]
        return (Path(paths[-1]) / WEIGHTS_NAME).read_bytes()


@dataclass
class Registry:
    url: str

    async def services(self) -> list[ServiceRecord]:
        return [ServiceRecord(ServiceKind.TRAINER, "trainer-1", self.url, 0, "training", None)]


@asynccontextmanager
async def trainer_service(transport: DiskTransport, folder: Path) -> AsyncIterator[str]:
    """The URL of a trainer's HTTP side."""
    service = Service("127.0.0.1", 0, "trainer.port")
    status = Status("run", 1, 1, 1, 1, Progress(folder))
    app = trainer_app(status, Requests(service.stop), transport.snapshot, CollectorRegistry(), TOKEN)
    running = asyncio.create_task(service.run(app, until=_until(service.stop)))
    yield service.url
    service.stop.set()
    await running


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    world = World(tmp_path)
    transport = DiskTransport(world.staging)
    fake = FakeSGLang()
    async with serving(fake) as url, trainer_service(transport, tmp_path) as trainer_url:
        engine = Engine(FakeServer(fake, url), SGLangClient(EngineSection(request_timeout_seconds=ANSWER_SECONDS)))
        weights = WeightUpdater(engine, SECTION, RolloutMetrics(), world.server())
        stop = asyncio.Event()
        keeping = asyncio.create_task(engine.keep_engine(stop, weights.forget))
        await engine.up.wait()
        yield Run(world, transport, fake, weights, Snapshots(Registry(trainer_url), TOKEN, 30.0))
        stop.set()
        await keeping
        await engine.close()
    world.close()


async def test_the_engine_loads_full_weights_that_deltas_gave(run: Run) -> None:
    for version in range(7):
        wanted = run.stage(version)
        await run.catch_up(wanted)
        assert run.weights.identity == wanted.identity
        assert run.loaded() == run.world.full()


async def test_a_damaged_chain_touches_nothing_and_is_mended_by_the_trainer(run: Run) -> None:
    await run.catch_up(run.stage(0))
    damaged = run.stage(1)
    flip(Path(damaged.path) / DELTA_NAME, 40)
    announced = run.stage(2)
    run.fake.calls.clear()
    with pytest.raises(ChainError, match=rf"{DELTA_NAME}: .* has digest .*: expected"):
        await run.catch_up(announced)
    assert (run.fake.calls, run.weights.state) == ([], "fenced")
    await run.catch_up(announced)
    assert run.weights.identity == announced.identity
    assert run.loaded() == run.world.full()
    await run.catch_up(run.stage(3))
    assert not (Path(run.transport.folder_of(3, 1)) / WEIGHTS_NAME).exists()
    assert run.loaded() == run.world.full()


def test_deltas_need_files() -> None:
    with pytest.raises(ValidationError, match="full_every 4 with transport nccl: expected transport disk"):
        WeightsSection(transport="nccl", full_every=4)

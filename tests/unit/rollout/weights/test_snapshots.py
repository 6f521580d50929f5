"""A server that is behind: it uses the files that exist, or asks the trainer for them over real HTTP."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.contracts import PolicyIdentity, ServiceKind
from penstock.contracts.canary import Canary
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.errors import WeightsBusyError, WeightsError
from penstock.runtime.http import make_app
from penstock.runtime.service import Service
from penstock_rollout.weights.snapshots import Snapshots
from penstock_trainer.app import trainer_app
from penstock_trainer.control import Requests
from penstock_trainer.telemetry.status import Status
from tests.unit.rollout.test_fake_engine import stage_weights

TOKEN = SecretStr("secret")


class Registry:
    def __init__(self, *trainers: str) -> None:
        self._records = [ServiceRecord(ServiceKind.TRAINER, "trainer-1", url, 1, "ready") for url in trainers]

    async def services(self) -> list[ServiceRecord]:
        return self._records


CANARY = Canary((4, 5), (-1.5,), 0.1)


class Disk:
    """The trainer's transport: writes files when it is asked."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.num_asked = 0

    def snapshot(self) -> Announcement:
        self.num_asked += 1
        if self.num_asked == 1:
            raise WeightsBusyError("no weights are staged yet; try again")
        path, digest = stage_weights(self._root, 7)
        return Announcement(PolicyIdentity(7, digest), path, 2, CANARY)


@contextlib.asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    service = Service("127.0.0.1", 0, "port")

    async def until_stopped() -> None:
        await service.stop.wait()

    running = asyncio.create_task(service.run(app, until=until_stopped()))
    try:
        yield service.url
    finally:
        service.stop.set()
        await running


def trainer(disk: Disk) -> FastAPI:
    status = cast(Status, SimpleNamespace(ready=True))
    return trainer_app(status, Requests(asyncio.Event()), disk.snapshot, CollectorRegistry(), TOKEN)


def announced(folder: Path) -> Announcement:
    return Announcement(PolicyIdentity(6, "a" * 16), str(folder), 2)


async def test_files_that_are_there_need_no_trainer(tmp_path: Path) -> None:
    path, _ = stage_weights(tmp_path, 6)
    assert await Snapshots(Registry(), None, 5).files_of(announced(Path(path))) == announced(Path(path))


async def test_the_trainer_writes_its_newest_version(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    async with serving(trainer(disk)) as url:
        snapshots = Snapshots(Registry(url), TOKEN, 5)
        with pytest.raises(WeightsError, match=r"HTTP 503.*no weights are staged yet"):
            await snapshots.files_of(announced(tmp_path / "nowhere"))
        files = await snapshots.files_of(announced(tmp_path / "nowhere"))
        assert (files.identity.number, files.lease, files.canary) == (7, 2, CANARY)
        assert (Path(files.path) / "model.safetensors").exists()
        with pytest.raises(WeightsError, match="HTTP 401"):
            await Snapshots(Registry(url), None, 5).files_of(announced(tmp_path / "nowhere"))
    assert disk.num_asked == 2


async def test_without_files_or_trainer_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere/manifest\.json does not exist, and no trainer runs"):
        await Snapshots(Registry(), None, 5).files_of(announced(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"trainer-1 at http://127\.0\.0\.1:1 wrote no snapshot: ConnectError"):
        await Snapshots(Registry("http://127.0.0.1:1"), None, 5).files_of(announced(tmp_path / "nowhere"))


async def test_an_answer_that_is_no_snapshot_is_told(tmp_path: Path) -> None:
    app = make_app("fake", not_ready=lambda: None, metrics=CollectorRegistry())

    @app.post("/v1/snapshot")
    async def hello() -> dict[str, str]:
        return {"hello": "world"}

    async with serving(app) as url:
        with pytest.raises(WeightsError, match="expected policy_version, checksum, path, lease and canary"):
            await Snapshots(Registry(url), None, 5).files_of(announced(tmp_path / "nowhere"))

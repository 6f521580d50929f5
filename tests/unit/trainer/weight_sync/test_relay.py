"""The trainer's side of a relay: what it sends, and which servers a push fences."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry

from penstock.broker import Queue
from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import LeftParent, Parent
from penstock.errors import WeightsError
from penstock.runtime.http import make_app
from penstock.runtime.service import Service
from penstock.weights.relay import Relay
from penstock_trainer.weight_sync.disk import DiskTransport
from penstock_trainer.weight_sync.publisher import Publisher, Push
from penstock_trainer.weight_sync.relay import RelayTransport
from penstock_trainer.weight_sync.relay_tree import RelayTree
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weights.staging import Staging
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.weights.delta_world import BF16, Source

CONFIG = Config.model_validate(
    {
        "actor": {"path": "m"},
        "data": {"train": {"path": "d"}},
        "weights": {"transport": "disk", "relay_fan_out": 2, "push_timeout_seconds": ANSWER_SECONDS},
    }
)


@dataclass
class Server:
    """Serves what is pushed to it, and reports `left`."""

    name: str
    left: list[LeftParent] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    doubts: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def app(self) -> FastAPI:
        app = make_app("fake", not_ready=lambda: None, metrics=CollectorRegistry())

        @app.put("/v1/weights/{version}")
        async def put(version: int, request: Request) -> JSONResponse:
            body = await request.json()
            self.sources.append(body["source"])
            left = [{"name": each.name, "reason": each.reason, "detail": each.detail} for each in self.left]
            served = {"policy_version": version, "checksum": body["digest"], "paused_seconds": 0.1, "left": left}
            engine = {"state": "serving", "engine": "", "engine_starts": 1, "engine_device": "", "engine_num_ranks": 1}
            return JSONResponse(served | engine)

        @app.post("/v1/weights/doubt")
        async def doubt(request: Request) -> JSONResponse:
            self.doubts.append(await request.json())
            return JSONResponse({})

        return app

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[ServiceRecord]:
        service = Service("127.0.0.1", 0, "port")
        running = asyncio.create_task(service.run(self.app(), until=_until(service.stop)))
        self.url = service.url
        try:
            yield ServiceRecord(ServiceKind.ROLLOUT, self.name, service.url, 0, "serving")
        finally:
            service.stop.set()
            await running


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


@dataclass
class Registry:
    records: list[ServiceRecord]

    async def services(self) -> list[ServiceRecord]:
        return self.records


class World:
    """A trainer that stages full versions."""

    def __init__(self, folder: Path) -> None:
        self.source = Source()
        self.staging = Staging(self.source, folder / "weights", BF16)


def relay_of(world: World, tree: RelayTree) -> RelayTransport:
    return RelayTransport(DiskTransport(world.staging), Relay(), tree)


async def pushed(world: World, servers: list[Server], *, times: int = 1) -> list[Push]:
    """Pushes of one version after the other to these servers."""
    tree = RelayTree(2, Parent("trainer-1", "http://127.0.0.1:1"))
    transport, client, pushes = relay_of(world, tree), RolloutClient(CONFIG), []
    async with contextlib.AsyncExitStack() as stack:
        records = [await stack.enter_async_context(each.serving()) for each in servers]
        publisher = Publisher(cast(Queue, Registry(records)), client, transport, ANSWER_SECONDS, tree)
        for version in range(1, times + 1):
            world.source.step()
            identity = await asyncio.to_thread(transport.stage, version, 7)
            path = str(transport.folder_of(version, 7))
            pushes.append(await publisher.push(Announcement(identity, path, 7, None, transport.chunks)))
        await client.close()
    return pushes


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_each_server_gets_its_parents(world: World) -> None:
    servers = [Server(f"s{n}") for n in range(4)]
    (push,) = await pushed(world, servers)
    assert push.live == ("s0", "s1", "s2", "s3")
    found = [[parent["name"] for parent in each.sources[0]["parents"]] for each in servers]
    assert found == [["trainer-1"], ["trainer-1"], ["s0", "trainer-1"], ["s0", "trainer-1"]]
    assert servers[2].sources[0]["parents"][0]["url"] == servers[0].url


async def test_only_the_server_that_sent_wrong_bytes_is_fenced(world: World) -> None:
    servers = [Server(f"s{n}") for n in range(8)]
    servers[2].left = [LeftParent("s0", "wrong", "it sent chunk 5 with another digest")]
    servers[4].left = [LeftParent("s1", "slow", "it sent 5 bytes a second")]
    servers[5].left = [LeftParent("s6", "wrong", "which is no parent of it")]
    first, second = await pushed(world, servers, times=2)
    assert first.fenced == {"s0": "another server left it: it sent chunk 5 with another digest"}
    assert first.live == ("s1", "s2", "s3", "s4", "s5", "s6", "s7")
    assert [(each.name, each.reason) for each in first.left] == [("s0", "wrong"), ("s1", "slow")]
    assert servers[0].doubts[0] == {"lease": 7, "why": "another server left it: it sent chunk 5 with another digest"}
    assert [each.name for each in servers if each.doubts] == ["s0"]
    parents = {parent["name"] for each in servers for parent in each.sources[1]["parents"]}
    assert parents.isdisjoint({"s0", "s1"})
    assert second.fenced == {}  # the same reports, now about servers that are no parents of the reporters
    assert second.live[-2:] == ("s0", "s1")  # leaves get the version last


async def test_the_trainer_sends_its_last_versions(world: World) -> None:
    transport = relay_of(world, RelayTree(2, Parent("trainer-1", "http://127.0.0.1:1")))
    digests = []
    for version in range(5):
        world.source.step()
        transport.stage(version, 1)
        digests.append(transport.chunks)
        assert transport.snapshot().chunks == transport.chunks
    assert transport.relay.digests == digests[-3:]
    for digest in digests[-3:]:
        held = await transport.relay.find(digest)
        assert held.read(len(held.chunks) - 1)
    with pytest.raises(WeightsError, match=digests[0]):
        await transport.relay.find(digests[0])
    transport.close()
    assert transport.relay.digests == []

"""A real queue server for the full test session, with an empty run on it for each test, and two real engines."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from penstock.broker import Queue, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from tests.patience import ANSWER_SECONDS

if TYPE_CHECKING:  # tests of the queue do not import torch
    from benchmarks.push_setup import RolloutServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def queue_config(redis_server: EmbeddedServer) -> Config:
    """The configuration of a new run on the session's server.

    Nothing expires by itself during a test: a test makes a worker dead or late (`queue_setup`, `broker_entries`).
    """
    return Config.model_validate(
        {
            "run": {"name": f"test-{uuid.uuid4().hex[:12]}", "stall_seconds": ANSWER_SECONDS},
            "actor": {"path": "unused"},
            "data": {"train": {"path": "unused"}},
            "staleness": {"heartbeat_seconds": 3600, "claim_idle_seconds": 3600},
            "redis": {"url": redis_server.url, "password": redis_server.password, "timeout_seconds": ANSWER_SECONDS},
        }
    )


@pytest.fixture
async def queue(queue_config: Config) -> AsyncIterator[Queue]:
    connected = await connect(queue_config)
    try:
        yield connected
    finally:
        async with asyncio.timeout(ANSWER_SECONDS):
            await connected.delete_run()
            await connected.close()


@pytest.fixture
async def trainer(queue: Queue, queue_config: Config) -> TrainerQueue:
    """The holder of the run's lease; it does not renew it."""
    return TrainerQueue(queue, await acquire_lease(queue, queue_config))


@pytest.fixture(scope="session")
def sglang_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    from tests.integration.rollout.sglang_pair import make_models

    return make_models(tmp_path_factory.mktemp("models"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sglang_pair(
    sglang_models: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> "AsyncIterator[list[RolloutServer]]":
    from tests.integration.rollout.sglang_pair import running_pair

    async with running_pair(sglang_models[0], tmp_path_factory.mktemp("pair")) as servers:
        yield servers

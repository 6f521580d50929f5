"""The rollout service as a process, against a real queue and a fake engine at `rollout.engine.url`."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import yaml

from penstock.broker import Queue, Served, Stage, Worker, connect
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.config.agent import AgentSection
from penstock.contracts import PolicyIdentity, RolloutGroup, Sampling, ServerState, ServiceKind, Ticket, pack_int32
from penstock.contracts.services import Announcement, ServiceRecord
from tests.integration.broker.queue_setup import read_group
from tests.patience import ANSWER_SECONDS, START_SECONDS
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving, stage_weights

pytestmark = [pytest.mark.redis, pytest.mark.slow]

AGENT: dict[str, object] = {"environment": "envs:Guess", "max_tokens": 32}


def ticket(number: int) -> Ticket:
    return Ticket(
        purpose="train",
        number=number,
        attempt=0,
        policy_version=0,
        prompt="p",
        prompt_ids=pack_int32([1, 2]),
        seeds=(number, number + 100),
        sampling=Sampling(1.0, 4, ()),
        answer="7",
        reward="",
        metadata={},
    )


async def started(
    folder: Path,
    config: Config,
    *,
    heartbeat_seconds: float = ANSWER_SECONDS,
    weights: dict[str, object] | None = None,
    agent: dict[str, object] | None = None,
    **engine: object,
) -> asyncio.subprocess.Process:
    document = {
        "run": {"name": config.run.name, "root": str(folder / "runs")},
        "actor": {"path": "unused", "group_size": 2},
        "sampling": {"max_new_tokens": 4},
        "data": {"train": {"path": "unused"}},
        "staleness": {"heartbeat_seconds": heartbeat_seconds},
        "rollout": {"engine": {"start_timeout_seconds": START_SECONDS, **engine}},
        "weights": weights or {},
        "agent": agent or {},
        "redis": {
            "url": config.redis.url,
            "password": config.redis.password and config.redis.password.get_secret_value(),
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "penstock_rollout", "--config", str(path), stderr=asyncio.subprocess.PIPE, env=environment
    )


@contextlib.asynccontextmanager
async def ended(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    try:
        yield
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def record_of(queue: Queue, process: asyncio.subprocess.Process) -> ServiceRecord:
    async with asyncio.timeout(ANSWER_SECONDS):
        while True:
            for record in await queue.services():
                if record.server_state not in (None, ServerState.STARTING):
                    return record
            assert process.returncode is None, await process.communicate()
            await asyncio.sleep(0.05)


async def next_group(worker: Worker) -> RolloutGroup:
    async with asyncio.timeout(ANSWER_SECONDS):
        while (delivery := await worker.take(Stage.ROLLOUTS)) is None:
            await worker.wait(timeout_seconds=1)
    return await read_group(worker, delivery)


async def test_its_record_says_at_once_that_the_engine_is_up(
    tmp_path: Path, queue: Queue, queue_config: Config
) -> None:
    async with serving(FakeSGLang()) as url:
        process = await started(tmp_path, queue_config, heartbeat_seconds=600, url=url)
        async with ended(process):
            assert (await record_of(queue, process)).engine == "sglang 0.5.21"


async def test_it_serves_pushes_tickets_and_sigterm(
    tmp_path: Path, queue: Queue, queue_config: Config, trainer: TrainerQueue
) -> None:
    lease = trainer.lease.number
    fake = FakeSGLang()
    async with serving(fake) as url:
        process = await started(tmp_path, queue_config, url=url)
        async with ended(process):
            record = await record_of(queue, process)
            assert (record.pid, record.engine, record.policy) == (process.pid, "sglang 0.5.21", None)
            path, digest = stage_weights(tmp_path, 0)
            async with httpx.AsyncClient(base_url=record.url) as http:
                answer = await http.put("/v1/weights/0", json={"path": path, "digest": digest, "lease": lease})
                assert (answer.status_code, answer.json()["checksum"]) == (200, digest)
            first = Announcement(PolicyIdentity(0, digest), path, lease)
            await trainer.issue([ticket(0)], first)
            worker = Worker(queue, "reward", queue_config.staleness)
            group = await next_group(worker)
            assert group.server == record.name
            assert {span.policy for each in group.completions for span in each.spans} == {first.identity}

            path, digest = stage_weights(tmp_path, 1)  # announced without a push, so the server is behind
            second = Announcement(PolicyIdentity(1, digest), path, lease)
            await trainer.issue([ticket(1)], second)
            group = await next_group(worker)
            assert group.completions[0].oldest_version == 1

            fake.going_on.clear()  # a group that cannot be finished is given back
            await trainer.issue([ticket(2)], second)
            async with asyncio.timeout(ANSWER_SECONDS):
                while fake.num_running == 0:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            _, errors = await asyncio.wait_for(process.communicate(), START_SECONDS)
            assert process.returncode == 0, errors
            assert [each for each in await queue.services() if each.kind is ServiceKind.ROLLOUT] == []
            other = Worker(queue, "other", queue_config.staleness)
            assert (await other.take(Stage.TICKETS, served=Served(PolicyIdentity(1, digest), lease))) is not None


@pytest.fixture
def agent_config(queue_config: Config) -> Config:
    return queue_config.model_copy(update={"agent": AgentSection.model_validate(AGENT)})


@pytest.fixture
async def agent_queue(agent_config: Config) -> AsyncIterator[Queue]:
    connected = await connect(agent_config)
    yield connected
    await connected.delete_run()
    await connected.close()


async def test_in_a_run_of_agents_it_answers_calls_and_leaves_tickets_alone(
    tmp_path: Path, agent_queue: Queue, agent_config: Config
) -> None:
    """It loads what is announced. At its end a call that runs has time, and a later one is refused."""
    queue, config = agent_queue, agent_config
    trainer = TrainerQueue(queue, await acquire_lease(queue, config))
    lease, fake = trainer.lease.number, FakeSGLang()
    call = {"prompt_ids": [1, 2], "max_new_tokens": 4, "at_least": {"number": 1, "lease": lease}}
    async with serving(fake) as url, contextlib.AsyncExitStack() as stack:
        process = await started(tmp_path, config, url=url, agent=AGENT)
        await stack.enter_async_context(ended(process))
        record = await record_of(queue, process)
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=record.url, timeout=ANSWER_SECONDS))
        assert (await http.post("/v1/generate", json=call)).status_code == 503
        path, digest = stage_weights(tmp_path, 1)
        await trainer.issue([ticket(0)], Announcement(PolicyIdentity(1, digest), path, lease))
        async with asyncio.timeout(ANSWER_SECONDS):
            while (answer := await http.post("/v1/generate", json=call)).status_code == 503:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert answer.json()["completions"][0]["spans"] == [[f"1-{digest}", 0, 4]]

        fake.holds_at = 2
        running = asyncio.create_task(http.post("/v1/generate", json=call))
        async with asyncio.timeout(ANSWER_SECONDS):
            while not fake.num_held:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(ANSWER_SECONDS):
            while "stops" not in (await http.get("/ready")).text:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await http.post("/v1/generate", json=call)).status_code == 503
        fake.holds_at = -1
        assert (await running).status_code == 200
        _, errors = await asyncio.wait_for(process.communicate(), START_SECONDS)
        assert process.returncode == 0, errors
        other = Worker(queue, "other", config.staleness)
        assert (await other.take(Stage.TICKETS, served=Served(PolicyIdentity(1, digest), lease))) is not None


async def test_episodes_that_are_too_long_for_the_engine_end_it(
    tmp_path: Path, agent_queue: Queue, agent_config: Config
) -> None:
    fake = FakeSGLang()
    fake.context_length = 32
    async with serving(fake) as url:
        process = await started(tmp_path, agent_config, url=url, agent=AGENT)
        async with ended(process):
            _, errors = await asyncio.wait_for(process.communicate(), START_SECONDS)
    assert process.returncode == 2
    assert b"agent.max_tokens is 32, and sglang 0.5.21 generates at most 26 tokens" in errors


async def test_without_an_engine_it_ends_and_names_the_key(tmp_path: Path, queue: Queue, queue_config: Config) -> None:
    process = await started(tmp_path, queue_config, python="does/not/exist")
    async with ended(process):
        _, errors = await asyncio.wait_for(process.communicate(), START_SECONDS)
    assert process.returncode == 6
    assert b"rollout: engine_start: rollout.engine.python: 'does/not/exist' is no executable" in errors


async def test_a_given_engine_that_stays_away_ends_it(
    tmp_path: Path, queue: Queue, queue_config: Config, trainer: TrainerQueue
) -> None:
    fake = FakeSGLang()
    async with serving(fake) as url:
        process = await started(tmp_path, queue_config, url=url, start_timeout_seconds=5)
        async with ended(process):
            await record_of(queue, process)
            path, digest = stage_weights(tmp_path, 0)
            fake.die_on_generate = True
            await trainer.issue([ticket(0)], Announcement(PolicyIdentity(0, digest), path, trainer.lease.number))
            async with asyncio.timeout(ANSWER_SECONDS):
                while "/generate" not in fake.paths():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert fake.server is not None
            fake.server.should_exit = True
            _, errors = await asyncio.wait_for(process.communicate(), START_SECONDS)
    assert process.returncode == 6
    assert b"rollout.engine.url: nothing answers like SGLang" in errors

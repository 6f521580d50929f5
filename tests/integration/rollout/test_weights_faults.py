"""Faults during a push to two rollout services: which is fenced, what is served meanwhile, and how it ends.

The services and the queue are real; the engines are fakes whose log-probabilities depend on the weights that they
really serve. Each test continues to the next version, as training does.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from penstock.broker import Queue, Worker
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import PolicyIdentity, RolloutGroup, ServerState, unpack_float32, unpack_int32
from penstock.contracts.canary import Canary
from penstock.contracts.services import Announcement, ServiceRecord
from penstock_trainer.weight_sync.disk import DiskTransport
from penstock_trainer.weight_sync.publisher import Publisher, Push
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weights.staging import Staging
from tests.integration.rollout.test_service import ended, next_group, started, ticket
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.fake_model import prompt_logprobs, token_logprob
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving, stage_weights
from tests.unit.rollout.weights.updater_setup import CYCLE

pytestmark = [pytest.mark.redis, pytest.mark.slow]

REACHED_SECONDS = 10.0  # a push's deadline that a test waits for; the push to the other server takes milliseconds
HEARTBEAT_SECONDS = 5
CANARY_TOKENS = (5, 6, 7)


@dataclass
class Server:
    """A rollout service and its engine."""

    fake: FakeSGLang
    url: str
    folder: Path
    process: asyncio.subprocess.Process | None = None

    @property
    def num_groups(self) -> int:
        """The number of groups that it was asked for."""
        asked = (body for path, body in self.fake.calls if path == "/generate")
        return sum(isinstance(body["sampling_params"], list) for body in asked)


@dataclass
class Run:
    """The trainer's side of a run, and its servers."""

    queue: Queue
    config: Config
    trainer: TrainerQueue
    publisher: Publisher
    folder: Path
    stack: contextlib.AsyncExitStack
    reward: Worker
    push_timeout_seconds: float
    servers: list[Server] = field(default_factory=list)
    num_tickets: int = 0

    async def add_server(self) -> Server:
        fake = FakeSGLang()
        url = await self.stack.enter_async_context(serving(fake))
        folder = self.folder / f"server-{len(self.servers)}"
        await asyncio.to_thread(folder.mkdir)
        self.servers.append(Server(fake, url, folder))
        await self.start(self.servers[-1])
        return self.servers[-1]

    async def start(self, server: Server) -> None:
        weights: dict[str, object] = {"push_timeout_seconds": self.push_timeout_seconds}
        server.process = await started(
            server.folder, self.config, heartbeat_seconds=HEARTBEAT_SECONDS, url=server.url, weights=weights
        )
        await self.stack.enter_async_context(ended(server.process))

    async def record(self, server: Server, holds: Callable[[ServiceRecord], bool]) -> ServiceRecord:
        """Wait until the server's record is like this; returns it."""
        assert server.process is not None
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                for record in await self.queue.services():
                    if record.pid == server.process.pid and holds(record):
                        return record
                await asyncio.sleep(0.05)

    async def forgets(self, name: str) -> None:
        """Wait until the record of a server that was killed has expired, and its tickets are free."""
        async with asyncio.timeout(ANSWER_SECONDS):
            while name in {each.name for each in await self.queue.services()}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def serves(self, server: Server, version: int) -> ServiceRecord:
        return await self.record(server, lambda each: each.policy is not None and each.policy.number == version)

    async def release(self, version: int, *, damage: Callable[[Path], None] = lambda _: None) -> Push:
        """Do as the trainer does: stage, push, then announce with four new tickets."""
        path, digest = stage_weights(self.folder / "weights", version)
        damage(Path(path))
        canary = Canary(CANARY_TOKENS, prompt_logprobs(CANARY_TOKENS, f"{version}-"), tolerance=0.01)
        wanted = Announcement(PolicyIdentity(version, digest), path, self.trainer.lease.number, canary)
        push = await self.publisher.push(wanted)
        numbers = range(self.num_tickets, self.num_tickets + 4)
        self.num_tickets += 4
        await self.trainer.issue([ticket(number) for number in numbers], wanted)
        return push

    async def groups(self, count: int, version: int) -> list[RolloutGroup]:
        """Take this many groups; check that each token names this version, and is by its weights."""
        groups = [await next_group(self.reward) for _ in range(count)]
        for completion in (each for group in groups for each in group.completions):
            assert [span.policy.number for span in completion.spans] == [version]
            expected = [token_logprob(token, f"{version}-") for token in unpack_int32(completion.token_ids)]
            assert unpack_float32(completion.logprobs) == pytest.approx(expected)
        return groups


@pytest.fixture
def push_timeout_seconds() -> float:
    """The push deadline of the trainer and of both servers; a test that waits for it sets its own."""
    return ANSWER_SECONDS


@pytest.fixture
async def run(queue: Queue, queue_config: Config, tmp_path: Path, push_timeout_seconds: float) -> AsyncIterator[Run]:
    """A trainer and two servers that serve version 1."""
    document = queue_config.model_dump()
    document["weights"]["push_timeout_seconds"] = push_timeout_seconds
    config = Config.model_validate(document)
    async with contextlib.AsyncExitStack() as stack:
        client = RolloutClient(config)
        stack.push_async_callback(client.close)
        publisher = Publisher(queue, client, DiskTransport(cast(Staging, None)), push_timeout_seconds)
        trainer = TrainerQueue(queue, await acquire_lease(queue, config))
        reward = Worker(queue, "reward", config.staleness)
        run = Run(queue, queue_config, trainer, publisher, tmp_path, stack, reward, push_timeout_seconds)
        for server in [await run.add_server() for _ in range(2)]:
            await run.record(server, lambda each: each.server_state is not ServerState.STARTING)
        push = await run.release(1)
        assert (len(push.live), push.fenced) == (2, {})
        await run.groups(4, version=1)
        yield run


async def name_of(run: Run, server: Server) -> str:
    return (await run.record(server, lambda _: True)).name


async def goes_on(run: Run, version: int) -> None:
    """Check that the next version reaches both servers."""
    push = await run.release(version)
    assert (len(push.live), push.fenced) == (2, {})
    await run.groups(4, version)


async def test_a_server_killed_in_the_middle_of_a_push_is_fenced_and_comes_back(run: Run) -> None:
    first = run.servers[0]
    names = [await name_of(run, each) for each in run.servers]
    first.fake.may_load.clear()
    pushing = asyncio.create_task(run.release(2))
    while "/update_weights_from_disk" not in first.fake.paths()[-1:]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert first.process is not None
    first.process.kill()
    push = await pushing
    assert (push.live, list(push.fenced)) == ((names[1],), [names[0]])
    assert "weights.push_timeout_seconds" not in push.fenced[names[0]]  # no one waited for the deadline
    assert {group.server for group in await run.groups(4, version=2)} == {names[1]}

    first.fake.may_load.set()
    await run.start(first)
    await run.serves(first, 2)
    await run.forgets(names[0])
    await goes_on(run, 3)


@pytest.mark.parametrize("push_timeout_seconds", [REACHED_SECONDS])
async def test_a_server_whose_engine_hangs_is_fenced_in_time_and_catches_up(run: Run) -> None:
    first = run.servers[0]
    names = [await name_of(run, each) for each in run.servers]
    first.fake.may_load.clear()
    before = first.num_groups
    push = await run.release(2)
    assert (push.live, list(push.fenced)) == ((names[1],), [names[0]])
    assert {group.server for group in await run.groups(4, version=2)} == {names[1]}
    assert first.num_groups == before

    first.fake.may_load.set()
    await run.serves(first, 2)
    await goes_on(run, 3)


@pytest.mark.parametrize("push_timeout_seconds", [REACHED_SECONDS])
async def test_a_server_that_is_frozen_is_fenced_in_time_and_catches_up(run: Run) -> None:
    first = run.servers[0]
    names = [await name_of(run, each) for each in run.servers]
    assert first.process is not None
    first.process.send_signal(signal.SIGSTOP)
    push = await run.release(2)
    assert (push.live, list(push.fenced)) == ((names[1],), [names[0]])
    assert "weights.push_timeout_seconds" in push.fenced[names[0]]
    assert {group.server for group in await run.groups(4, version=2)} == {names[1]}

    first.process.send_signal(signal.SIGCONT)
    await run.serves(first, 2)
    await goes_on(run, 3)


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def cut_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(("damage", "reason"), [(flip_a_bit, "tensor w has digest"), (cut_the_manifest, "manifest")])
async def test_damaged_files_reach_no_engine_and_serve_no_ticket(run: Run, damage: Any, reason: str) -> None:
    loads = [each.fake.paths().count("/update_weights_from_disk") for each in run.servers]
    before = [each.num_groups for each in run.servers]
    push = await run.release(2, damage=damage)
    assert (push.live, len(push.fenced)) == ((), 2)
    assert all("HTTP 422" in each and reason in each for each in push.fenced.values())
    for server in run.servers:
        await run.record(server, lambda each: each.server_state is ServerState.FENCED)
    assert [each.fake.paths().count("/update_weights_from_disk") for each in run.servers] == loads
    assert [each.num_groups for each in run.servers] == before

    push = await run.release(3)
    assert (len(push.live), push.fenced) == (2, {})
    await run.groups(8, version=3)


async def test_a_server_that_says_it_loaded_and_serves_other_weights_is_fenced(run: Run) -> None:
    first = run.servers[0]
    names = [await name_of(run, each) for each in run.servers]
    first.fake.sticks_to = "1-"
    before = first.num_groups
    push = await run.release(2)
    assert (push.live, list(push.fenced)) == ((names[1],), [names[0]])
    assert "weights.canary_tolerance" in push.fenced[names[0]]
    assert {group.server for group in await run.groups(4, version=2)} == {names[1]}
    assert first.num_groups == before

    first.fake.sticks_to = ""
    await run.serves(first, 2)
    await goes_on(run, 3)


async def test_a_joiner_is_proved_at_the_newest_version_before_its_first_ticket(run: Run) -> None:
    await goes_on(run, 2)
    joiner = await run.add_server()
    await run.serves(joiner, 2)
    for server in run.servers[:2]:
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        await server.process.wait()
    push = await run.release(3)
    assert (push.live, push.fenced) == ((await name_of(run, joiner),), {})
    await run.groups(4, version=3)
    calls = [call for call in joiner.fake.calls if call[0] != "/freeze_gc"]
    assert [path for path, _ in calls[:6]] == [*CYCLE, "/generate"]
    assert calls[5][1]["input_ids"] == list(CANARY_TOKENS)  # its first request is the canary's


async def test_work_of_a_dead_server_goes_to_one_that_is_live(run: Run) -> None:
    for server in run.servers:
        server.fake.holds_at = 1
    await run.release(2)
    async with asyncio.timeout(ANSWER_SECONDS):
        while sum(server.fake.num_held for server in run.servers) < 4:  # noqa: ASYNC110 - both fakes
            await asyncio.sleep(0.01)
    dead, live = sorted(run.servers, key=lambda server: -server.fake.num_held)  # one may have taken all tickets
    assert dead.process is not None
    dead.process.kill()
    for server in run.servers:
        server.fake.holds_at = -1
    assert {group.server for group in await run.groups(4, version=2)} == {await name_of(run, live)}

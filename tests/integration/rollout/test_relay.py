"""Rollout services that relay weights, as processes that share no folder: faults in the middle of a push.

The services, the queue and the trainer's sending side are real; the engines are fakes. The tree is a line, so that each
server depends on the one before it.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from msgspec.structs import replace

from penstock.broker import Queue, Worker
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import ServerState, ServiceKind
from penstock.contracts.canary import Canary
from penstock.contracts.services import Announcement, ServiceRecord
from penstock_trainer.weight_sync.publisher import Publisher, Push
from penstock_trainer.weight_sync.relay import RelayTransport
from penstock_trainer.weight_sync.relay_tree import RelayTree
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weight_sync.transport import Transport
from tests.integration.rollout.test_service import ended, next_group, started, ticket
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.fake_model import prompt_logprobs
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving
from tests.unit.rollout.weights.relay_setup import NUM_CHUNKS, FaultyRelay, Sender, sending, staged

pytestmark = [pytest.mark.redis, pytest.mark.slow]

NUM_SERVERS = 3
RELAY: dict[str, object] = {"transport": "disk", "relay_fan_out": 1}
CANARY_TOKENS = (5, 6, 7)


class Trainer:
    """The trainer's sending side. `may_go_on`: cleared, it sends half of a version and then waits."""

    def __init__(self, folder: Path, lease: int) -> None:
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.relay = FaultyRelay(NUM_CHUNKS // 2, self._waits)
        self.lease = lease
        self._folder = folder

    async def _waits(self, piece: bytes) -> AsyncIterator[bytes]:
        await self.may_go_on.wait()
        yield piece

    def stage(self, version: int) -> Announcement:
        wanted, held = staged(self._folder, version)
        self.relay.hold(held)
        canary = Canary(CANARY_TOKENS, prompt_logprobs(CANARY_TOKENS, f"{version}-"), tolerance=0.01)
        return replace(wanted, path="/only/on/the/trainer", lease=self.lease, canary=canary)

    def publisher(self, queue: Queue, client: RolloutClient, sender: Sender) -> Publisher:
        tree = RelayTree(1, sender.parent)
        return Publisher(queue, client, RelayTransport(cast(Transport, None), self.relay, tree), ANSWER_SECONDS, tree)


@dataclass
class Server:
    fake: FakeSGLang
    folder: Path
    process: asyncio.subprocess.Process
    name: str = ""

    def file(self, name: str) -> list[Path]:
        """The files of this name of the versions that it has, oldest first."""
        return sorted(self.folder.glob(f"local/*/*/{name}"))

    def num_bytes(self, name: str) -> int:
        """What has come of the newest one, if it is not complete; 0 otherwise."""
        sizes = [path.stat().st_size for path in self.file(name)]
        return sizes[-1] if len(sizes) == 2 else 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)


@dataclass
class Run:
    queue: Queue
    config: Config
    client: RolloutClient
    trainer: Trainer
    sending: contextlib.AsyncExitStack
    tickets: TrainerQueue
    publisher: Publisher
    reward: Worker
    folder: Path
    stack: contextlib.AsyncExitStack
    servers: list[Server] = field(default_factory=list)
    num_tickets: int = 0

    async def add_server(self) -> Server:
        fake = FakeSGLang()
        url = await self.stack.enter_async_context(serving(fake))
        folder = self.folder / f"server-{len(self.servers)}"
        await asyncio.to_thread(folder.mkdir)
        weights = {**RELAY, "local_folder": str(folder / "local")}
        process = await started(folder, self.config, heartbeat_seconds=5, url=url, weights=weights)
        server = Server(fake, folder, process)
        await self.stack.enter_async_context(ended(process))
        self.servers.append(server)
        server.name = (await self.record(server, lambda each: each.server_state is not ServerState.STARTING)).name
        return server

    async def record(self, server: Server, holds: Callable[[ServiceRecord], bool]) -> ServiceRecord:
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                for record in await self.queue.services():
                    if record.pid == server.process.pid and holds(record):
                        return record
                assert server.process.returncode is None, await server.process.communicate()
                await asyncio.sleep(0.05)

    async def line(self) -> list[Server]:
        """The servers in the order of the line."""
        by_name = {each.name: each for each in self.servers}
        return [by_name[each.name] for each in await self.queue.services() if each.name in by_name]

    async def release(self, version: int) -> Push:
        """Push, and announce with four tickets; the groups are taken by all servers."""
        wanted = self.trainer.stage(version)
        push = await self.publisher.push(wanted)
        numbers = range(self.num_tickets, self.num_tickets + 4)
        self.num_tickets += 4
        await self.tickets.issue([ticket(number) for number in numbers], wanted)
        return push

    async def goes_on(self, version: int) -> None:
        """The next version reaches all servers that run, and its groups are by it alone."""
        running = {each.name for each in self.servers if each.process.returncode is None}
        push = await self.release(version)
        assert (set(push.live), push.fenced) == (running, {})
        for group in [await next_group(self.reward) for _ in range(4)]:
            assert {span.policy.number for each in group.completions for span in each.spans} == {version}

    async def half_sent(self, last: Server) -> None:
        """Wait until the trainer waits and the server has what was sent."""
        async with asyncio.timeout(ANSWER_SECONDS):
            while last.num_bytes("config.json") < 2**20:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.fixture
def queue_config(queue_config: Config) -> Config:
    section = queue_config.weights.model_copy(update=RELAY)
    return queue_config.model_copy(update={"weights": section})


@pytest.fixture
async def run(queue: Queue, queue_config: Config, trainer: TrainerQueue, tmp_path: Path) -> AsyncIterator[Run]:
    """A trainer and three servers that serve version 1."""
    async with contextlib.AsyncExitStack() as stack:
        client = RolloutClient(queue_config)
        stack.push_async_callback(client.close)
        sender_side = Trainer(tmp_path / "trainer", trainer.lease.number)
        sending_until = await stack.enter_async_context(contextlib.AsyncExitStack())
        sender = await sending_until.enter_async_context(sending("trainer-1", sender_side.relay, token=None))
        await queue.register(ServiceRecord(ServiceKind.TRAINER, "trainer-1", sender.url, 0, "training"), 600)
        publisher = sender_side.publisher(queue, client, sender)
        reward = Worker(queue, "reward", queue_config.staleness)
        run = Run(queue, queue_config, client, sender_side, sending_until, trainer, publisher, reward, tmp_path, stack)
        for _ in range(NUM_SERVERS):
            await run.add_server()
        await run.goes_on(1)
        yield run


async def test_a_joiner_gets_the_announced_version_from_another_server(run: Run) -> None:
    run.trainer.relay.drop_all_but(set())  # the trainer has it no more
    joiner = await run.add_server()
    await run.record(joiner, lambda each: each.policy is not None and each.policy.number == 1)
    await run.goes_on(2)


async def test_a_server_killed_in_the_middle_of_a_push_holds_no_other_up(run: Run) -> None:
    first, second, third = await run.line()
    run.trainer.may_go_on.clear()
    pushing = asyncio.create_task(run.release(2))
    await run.half_sent(third)
    second.kill()
    await second.process.wait()
    run.trainer.may_go_on.set()
    push = await pushing
    assert (set(push.live), list(push.fenced)) == ({first.name, third.name}, [second.name])
    assert [(each.name, each.reason) for each in push.left] == [(second.name, "gone")]
    for _ in range(4):
        await next_group(run.reward)
    async with asyncio.timeout(ANSWER_SECONDS):
        while second.name in {each.name for each in await run.queue.services()}:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await run.goes_on(3)


async def test_a_server_that_passes_on_damaged_bytes_is_fenced_and_loads_them_anew(run: Run) -> None:
    """Its file is damaged after it was compared, and before the next server has read it."""
    first, second, third = await run.line()
    run.trainer.may_go_on.clear()
    second.kill(signal.SIGSTOP)
    pushing = asyncio.create_task(run.release(2))
    await run.half_sent(first)
    with first.file("config.json")[-1].open("r+b") as file:
        file.seek(5 * 2**16)
        file.write(b"damage")
    second.kill(signal.SIGCONT)
    run.trainer.may_go_on.set()
    push = await pushing
    assert (set(push.live), list(push.fenced)) == ({second.name, third.name}, [first.name])
    assert {(each.name, each.reason) for each in push.left} == {(first.name, "wrong")}
    await run.record(first, lambda each: each.policy is not None and each.policy.number == 2)
    good = second.file("config.json")[-1].read_bytes()
    assert first.file("config.json")[-1].read_bytes() == good
    assert b"damage" not in good
    for _ in range(4):
        await next_group(run.reward)
    await run.goes_on(3)


async def test_a_trainer_that_dies_in_the_middle_of_a_push_is_followed_by_another(run: Run) -> None:
    run.trainer.may_go_on.clear()
    *_, third = await run.line()
    pushing = asyncio.create_task(run.publisher.push(run.trainer.stage(2)))
    await run.half_sent(third)
    await run.sending.aclose()
    push = await pushing
    assert (push.live, len(push.fenced)) == ((), NUM_SERVERS)
    assert all("trainer-1: gone" in each for each in push.fenced.values())

    successor = Trainer(run.folder / "successor", run.trainer.lease + 1)
    wanted = successor.stage(2)
    async with sending("trainer-2", successor.relay, token=None) as sender:
        publisher = successor.publisher(run.queue, run.client, sender)
        push = await publisher.push(wanted)
    assert (len(push.live), push.fenced) == (NUM_SERVERS, {})
    for server in run.servers:
        await run.record(server, lambda each: each.policy == wanted.identity)

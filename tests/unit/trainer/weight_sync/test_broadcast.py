"""Process groups of trainer and engine over real gloo: when one is formed, reused and given up, and deadlines."""

import asyncio
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from penstock.contracts import PolicyIdentity, ServerState, ServiceKind
from penstock.contracts.services import Announcement, ServedWeights, ServiceRecord, version_body
from penstock.contracts.weight_sources import CollectiveSource, GroupRequest
from penstock.errors import ConfigError, WeightsError
from penstock_trainer.weight_sync import broadcast as transport_collective
from penstock_trainer.weight_sync.broadcast import BroadcastTransport
from penstock_trainer.weight_sync.process_group import Group, MeetingPoint, in_thread
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weights.files import Format, LiveWeights
from tests.patience import ANSWER_SECONDS
from tests.unit.trainer.weights.test_buckets import Source, example

CPU = torch.device("cpu")
SECONDS = ANSWER_SECONDS
ENGINE: dict[str, Any] = {
    "paused_seconds": 0.0,
    "state": ServerState.SERVING,
    "engine": "",
    "engine_device": "cpu",
    "engine_num_ranks": 1,
}


class Peer:
    """An engine's end of a group, like SGLang's: it joins, and receives when the test lets it."""

    def __init__(self, request: GroupRequest, sizes: list[int], *, receives: bool = True) -> None:
        self.received: list[Tensor] = []
        self.got_all = Event()
        self.may_receive = Event()
        self._leaves = False
        if receives:
            self.may_receive.set()
        Thread(target=self._run, args=(request, sizes), daemon=True).start()

    def leave(self) -> None:
        """Break the connections, like an engine that was killed."""
        self._leaves = True
        self.may_receive.set()

    def _run(self, request: GroupRequest, sizes: list[int]) -> None:
        store = TCPStore(request.address, request.port, timeout=timedelta(seconds=SECONDS))
        names = PrefixStore("cpu/", PrefixStore(f"{request.group}/", PrefixStore(request.group, store)))
        group: Any = dist.ProcessGroupGloo(names, 1, request.num_ranks, timedelta(seconds=SECONDS))
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self.may_receive.wait(timeout=SECONDS)
        if self._leaves:
            return  # the group is deleted with this frame, and so are its connections
        try:
            while True:
                for size in sizes:
                    self.received.append(torch.empty(size, dtype=torch.uint8))
                    group.broadcast([self.received[-1]], options).wait()
                self.got_all.set()
        except RuntimeError:
            return  # the group was given up


class Servers:
    """The part of `RolloutClient` that forms groups; each URL has one engine."""

    def __init__(self, *, receive: Callable[[str], bool] = lambda _: True) -> None:
        self.starts = 1
        self.peers: dict[str, list[Peer]] = {}
        self.refuse = ""
        self.absent = False
        self.serves: PolicyIdentity | None = None
        self.sizes: list[int] = []
        self._receive = receive

    async def served(self, url: str) -> ServedWeights:
        return ServedWeights(**version_body(self.serves), **ENGINE, engine_starts=self.starts)

    async def join_group(self, url: str, request: GroupRequest) -> None:
        if self.refuse:
            raise WeightsError(self.refuse)
        if not self.absent:
            peer = Peer(request, self.sizes, receives=self._receive(url))
            self.peers.setdefault(url, []).append(peer)


def make(servers: Servers, folder: Path, seconds: float = SECONDS) -> BroadcastTransport:
    transport = BroadcastTransport(
        Source(LiveWeights(example())),
        folder,
        Format("float32", "nearest"),
        bucket_bytes=50_000,
        keep=2,
        client=cast(RolloutClient, servers),
        point=MeetingPoint("127.0.0.1", 0),
        device=CPU,
        seconds=seconds,
    )
    servers.sizes = [bucket.data.numel() for bucket in transport.copy.buckets]
    return transport


async def deliver(transport: BroadcastTransport, url: str, version: int = 1) -> CollectiveSource:
    server = ServiceRecord(ServiceKind.ROLLOUT, url, url, 1, "serving")
    announcement = Announcement(PolicyIdentity(version, "a" * 16), "/nowhere", 5)
    async with transport.delivery(server, announcement) as source:
        return source


async def test_what_is_staged_arrives_and_the_group_is_used_again(tmp_path: Path) -> None:
    servers = Servers()
    transport = make(servers, tmp_path)
    transport.stage(1, 5)
    first = await deliver(transport, "a")
    (peer,) = servers.peers["a"]
    assert await asyncio.to_thread(peer.got_all.wait, SECONDS)
    expected = torch.cat([weight.reshape(-1).view(torch.uint8) for weight in example().values()])
    assert torch.equal(torch.cat(peer.received[: len(first.buckets)]), expected)
    assert [spec.name for bucket in first.buckets for spec in bucket] == list(example())
    transport.stage(2, 5)
    assert (await deliver(transport, "a", 2)).group == first.group
    assert (await deliver(transport, "b", 2)).group != first.group  # each engine has its own group
    servers.starts = 2
    assert (await deliver(transport, "a", 3)).group not in ("", first.group)
    assert len(servers.peers["a"]) == 2


async def test_a_server_that_serves_the_version_already_is_sent_nothing(tmp_path: Path) -> None:
    """The server has the version, as after a restart of the trainer: it would answer at once without receiving."""
    servers = Servers(receive=lambda _: False)
    servers.serves = PolicyIdentity(1, "a" * 16)
    transport = make(servers, tmp_path, seconds=3)
    transport.stage(1, 5)
    assert (await deliver(transport, "a")).buckets == ()
    assert servers.peers == {}
    servers.serves = PolicyIdentity(1, "b" * 16)  # a version with that number, by another life
    with pytest.raises(WeightsError):
        await deliver(transport, "a")
    assert len(servers.peers["a"]) == 1


async def test_a_peer_that_does_not_receive_holds_nobody_else_up(tmp_path: Path) -> None:
    servers = Servers(receive=lambda url: url != "hung")
    transport = make(servers, tmp_path, seconds=5)
    transport.stage(1, 5)
    hung = asyncio.create_task(reason_of(transport, "hung"))
    await deliver(transport, "well")
    assert not hung.done()
    assert "the broadcast to its engine failed" in await hung
    servers.peers["hung"][0].may_receive.set()
    old = len(servers.peers["hung"])
    transport.stage(2, 5)
    servers._receive = lambda _: True
    await deliver(transport, "hung", 2)
    assert len(servers.peers["hung"]) == old + 1  # the failed group was not used again


async def reason_of(transport: BroadcastTransport, url: str) -> str:
    """The reason of the failure."""
    with pytest.raises(WeightsError) as raised:
        await deliver(transport, url)
    return str(raised.value)


async def test_a_server_whose_engine_is_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is dead, and the service has not noticed yet."""
    monkeypatch.setattr(transport_collective, "REASON_SECONDS", 0.1)
    servers = Servers(receive=lambda _: False)
    transport = make(servers, tmp_path, seconds=10 * SECONDS)
    transport.stage(1, 5)
    server = ServiceRecord(ServiceKind.ROLLOUT, "a", "a", 1, "serving")

    async def put() -> None:
        async with transport.delivery(server, Announcement(PolicyIdentity(1, "a" * 16), "/nowhere", 5)):
            servers.peers["a"][0].leave()
            await asyncio.Event().wait()

    with pytest.raises(WeightsError, match="the broadcast to its engine failed"):
        async with asyncio.timeout(SECONDS):
            await put()


async def test_a_delivery_that_failed_gives_up_its_group(tmp_path: Path) -> None:
    servers = Servers()
    transport = make(servers, tmp_path)
    transport.stage(1, 5)
    await deliver(transport, "a")
    server = ServiceRecord(ServiceKind.ROLLOUT, "a", "a", 1, "serving")
    with pytest.raises(WeightsError, match="HTTP 502"):
        async with transport.delivery(server, Announcement(PolicyIdentity(2, "a" * 16), "/nowhere", 5)):
            raise WeightsError("HTTP 502: its engine died")
    transport.stage(3, 5)
    await deliver(transport, "a", 3)
    assert len(servers.peers["a"]) == 2


async def test_a_server_that_does_not_join_is_told_apart_from_one_that_never_comes(tmp_path: Path) -> None:
    servers = Servers()
    transport = make(servers, tmp_path, seconds=1.0)
    transport.stage(1, 5)
    servers.refuse = "it did not join a group: HTTP 409: lease 5 is lower than 6"
    with pytest.raises(WeightsError, match="HTTP 409"):
        await deliver(transport, "a")
    servers.refuse, servers.absent = "", True
    with pytest.raises(WeightsError, match="its engine and the trainer did not meet in a group"):
        await deliver(transport, "a")


def test_a_port_that_is_taken_names_the_key() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"weights\.rendezvous_port: 127\.0\.0\.1:{port} cannot be listened on"):
            MeetingPoint("127.0.0.1", port)


async def test_a_thread_tells_its_result_or_its_error() -> None:
    assert await in_thread(lambda: 7) == 7
    point = MeetingPoint("127.0.0.1", 0)
    with pytest.raises(RuntimeError):
        await in_thread(lambda: Group.meet(point.store, "alone", 2, "gloo", CPU, 0.2))

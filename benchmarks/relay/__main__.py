"""Measures how long a version takes to reach all rollout servers by a relay tree, against all from one place (a star).

Owns the run: as many processes as servers on one host, each of which sends over a link of limited speed, as the trainer
does. So what is measured is the tree and not this host; with few cores the bytes must be few. The star is the same code
with all servers as children of the trainer. Each server compares all chunks and tensors before it answers.

    .venv/bin/python -m benchmarks.relay                      # about ten minutes
    .venv/bin/python -m benchmarks.relay --faults             # 64 servers, one of which has a fault
    .venv/bin/python -m benchmarks.relay --raw-megabytes 1024 # no limit: what one stream carries here
"""

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import torch
from prometheus_client import CollectorRegistry

from benchmarks.relay.server import Fault, Link, LinkedRelay, serve
from penstock.broker import Queue
from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import Parent
from penstock.runtime.http import make_app
from penstock.runtime.relay_route import add_relay
from penstock.runtime.service import Service
from penstock_trainer.weight_sync.disk import DiskTransport
from penstock_trainer.weight_sync.publisher import Publisher, Push
from penstock_trainer.weight_sync.relay import RelayTransport
from penstock_trainer.weight_sync.relay_tree import RelayTree
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weights.files import Format, LiveWeights
from penstock_trainer.weights.staging import Staging

SECONDS = 600.0
CONFIG = Config.model_validate(
    {
        "actor": {"path": "unused"},
        "data": {"train": {"path": "unused"}},
        "weights": {"transport": "disk", "relay_fan_out": 2, "push_timeout_seconds": SECONDS},
    }
)
FAULTS: tuple[Fault | str, ...] = ("", "killed", "slow", "corrupting")
WAITS_SECONDS = 0.5  # before the first push, for the processes to come to rest


class Source:
    """Weights of a given size, other ones in each version."""

    def __init__(self, num_bytes: int) -> None:
        self._held = {f"layer.{n}.weight": torch.randn(num_bytes // 32) for n in range(8)}

    def weights(self) -> LiveWeights:
        return LiveWeights(self._held)

    def config_json(self, dtype: str) -> bytes:
        return b"{}"


@dataclass
class Server:
    process: BaseProcess
    pipe: Connection
    record: ServiceRecord


@dataclass
class Registry:
    records: list[ServiceRecord]

    async def services(self) -> list[ServiceRecord]:
        return self.records


@contextlib.contextmanager
def servers(number: int, root: Path, link: float, fault: str) -> Iterator[list[Server]]:
    """That many processes; the first has the fault."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.relay.server"])
    started: list[Server] = []
    try:
        for n in range(number):
            own, other = context.Pipe()
            own_fault = fault if n == 0 and fault != "killed" else ""
            process = context.Process(target=serve, args=(f"s{n}", str(root), link, own_fault, other), daemon=True)
            process.start()
            other.close()
            started.append(Server(process, own, ServiceRecord(ServiceKind.ROLLOUT, f"s{n}", "", 0, "serving")))
        for server in started:
            url = server.pipe.recv()
            server.record = ServiceRecord(ServiceKind.ROLLOUT, server.record.name, url, 0, "serving")
        yield started
    finally:
        for server in started:
            server.pipe.close()
        for server in started:
            server.process.join()


@contextlib.asynccontextmanager
async def sending(relay: LinkedRelay) -> AsyncIterator[str]:
    app = make_app("trainer", not_ready=lambda: None, metrics=CollectorRegistry())
    add_relay(app, relay)
    service = Service("127.0.0.1", 0, "port")
    running = asyncio.create_task(service.run(app, until=_until(service.stop)))
    try:
        yield service.url
    finally:
        service.stop.set()
        await running


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


async def push(number: int, fan_out: int, num_bytes: int, link: float, fault: str = "") -> tuple[Push, float, float]:
    """One push to that many servers; the seconds that the staging took, and CPU seconds of this process in the push."""
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))
    relay, client = LinkedRelay(Link(link)), RolloutClient(CONFIG)
    try:
        with servers(number, root, link, fault) as started:
            async with sending(relay) as url:
                tree = RelayTree(fan_out, Parent("trainer", url))
                staging = Staging(Source(num_bytes), root / "weights", Format("float32", "nearest"))
                transport = RelayTransport(DiskTransport(staging), relay, tree)
                begun = time.perf_counter()
                identity = await asyncio.to_thread(transport.stage, 1, 1)
                stage_seconds = time.perf_counter() - begun
                announcement = Announcement(identity, "/only/on/the/trainer", 1, None, transport.chunks)
                registry = cast(Queue, Registry([each.record for each in started]))
                await asyncio.sleep(WAITS_SECONDS)
                cpu_begun = time.process_time()
                pushing = asyncio.create_task(Publisher(registry, client, transport, SECONDS, tree).push(announcement))
                if fault == "killed":
                    await asyncio.sleep(num_bytes / link)  # in the middle, with two children
                    started[0].process.kill()
                result = await pushing
                await client.close()
                return result, stage_seconds, time.process_time() - cpu_begun
    finally:
        shutil.rmtree(root)


def show_sizes(numbers: list[int], fan_out: int, num_bytes: int, link: float) -> None:
    print(f"{num_bytes / 1e6:g} MB over links of {link / 1e6:g} MB/s, fan-out {fan_out}; {_load()}")
    print("| Servers | tree, s | star, s | star / tree | one copy over one link, s |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for number in numbers:
        tree = _verified(asyncio.run(push(number, fan_out, num_bytes, link))[0], number)
        star = _verified(asyncio.run(push(number, number, num_bytes, link))[0], number)
        copy = num_bytes / link
        print(f"| {number} | {tree:.1f} | {star:.1f} | {star / tree:.1f} | {copy:.1f} |", flush=True)


def show_faults(number: int, fan_out: int, num_bytes: int, link: float) -> None:
    print(f"{number} servers, {num_bytes / 1e6:g} MB over links of {link / 1e6:g} MB/s, fan-out {fan_out}; {_load()}")
    print("| The first server is | push, s | live | fenced | parents left |")
    print("| --- | ---: | ---: | --- | --- |")
    for fault in FAULTS:
        result, *_ = asyncio.run(push(number, fan_out, num_bytes, link, fault))
        left = ", ".join(sorted(f"{each.name} {each.reason}" for each in result.left))
        fenced = ", ".join(result.fenced) or "none"
        print(f"| {fault or 'healthy'} | {result.seconds:.1f} | {len(result.live)} | {fenced} | {left or 'none'} |")


def show_raw(num_bytes: int) -> None:
    print(f"{num_bytes / 1e6:g} MB without a limit, between processes of this host; {_load()}")
    for number, fan_out in ((1, 1), (2, 2), (2, 1)):
        result, stage_seconds, cpu_seconds = asyncio.run(push(number, fan_out, num_bytes, 0.0))
        seconds = _verified(result, number)
        print(f"{number} servers, fan-out {fan_out}: {seconds:.2f} s, {num_bytes / seconds / 1e6:.0f} MB/s each")
        sent = num_bytes * min(number, fan_out) / 1e9
        print(f"  staged, with its list of chunks, in {stage_seconds:.2f} s")
        print(f"  CPU of the sending process: {cpu_seconds / sent:.2f} s for each GB")


def _verified(result: Push, number: int) -> float:
    if len(result.live) != number:
        raise SystemExit(f"{len(result.live)} of {number} servers have verified the version: {result.fenced}")
    return result.seconds


def _load() -> str:
    return f"load {os.getloadavg()[0]:.0f}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--fan-out", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=4.0)
    parser.add_argument("--link-megabytes", type=float, default=2.0, help="a second, of each process's sending side")
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--raw-megabytes", type=float, default=0.0)
    arguments = parser.parse_args()
    num_bytes, link = round(arguments.megabytes * 1e6), arguments.link_megabytes * 1e6
    if arguments.raw_megabytes:
        show_raw(round(arguments.raw_megabytes * 1e6))
    elif arguments.faults:
        show_faults(max(arguments.servers), arguments.fan_out, num_bytes, link)
    else:
        show_sizes(arguments.servers, arguments.fan_out, num_bytes, link)


if __name__ == "__main__":
    main()

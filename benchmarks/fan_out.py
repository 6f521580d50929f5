"""Measures what a push costs the trainer's loop by the number of rollout servers: its requests, not its bytes.

Owns the servers: as many ports of one process that answer each push at once with the version it names. The yardstick is
the same bytes written and read over as many kept connections with nothing but asyncio. CPU seconds are those of the
pushing process; other work on the machine hardly changes them.

    .venv/bin/python -m benchmarks.fan_out        # a minute
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing.connection import Connection
from statistics import median

from penstock.config import Config
from penstock.contracts import PolicyIdentity, ServerState, to_body
from penstock.contracts.services import Announcement, ServedWeights, push_body
from penstock.contracts.weight_sources import DiskSource
from penstock_trainer.weight_sync.rollout_client import RolloutClient

HOST = "127.0.0.1"
LATER_PUSHES = 5
CONFIG = Config.model_validate({"actor": {"path": "unused"}, "data": {"train": {"path": "unused"}}})
DIGEST = "0123456789abcdef"


def serve(num_servers: int, pipe: Connection) -> None:
    """Runs the servers until the other end of `pipe` closes; sends their ports first."""

    async def run() -> None:
        servers = [await asyncio.start_server(answer_pushes, HOST, 0) for _ in range(num_servers)]
        pipe.send([server.sockets[0].getsockname()[1] for server in servers])
        await asyncio.to_thread(pipe.poll, None)
        os._exit(0)  # with thousands of open connections there is nothing to end in order

    asyncio.run(run())


async def answer_pushes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            lines = head.decode().split("\r\n")
            number = int(lines[0].split()[1].rpartition("/")[2])
            length = next(int(line[15:]) for line in lines if line.lower().startswith("content-length:"))
            await reader.readexactly(length)
            writer.write(answer(number))
    except asyncio.IncompleteReadError:
        pass
    finally:
        writer.close()


def answer(number: int) -> bytes:
    served = ServedWeights(number, DIGEST, 0.1, ServerState.SERVING, "", 1, "cpu", 1)
    body = json.dumps(to_body(served)).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def announcement(number: int) -> Announcement:
    return Announcement(PolicyIdentity(number, DIGEST), "/dev/shm/penstock-run/00000001.1", 1)


async def by_client(ports: Sequence[int], num_pushes: int) -> list[tuple[float, float]]:
    client = RolloutClient(CONFIG)

    async def push(number: int) -> None:
        urls = [f"http://{HOST}:{port}" for port in ports]
        await asyncio.gather(*(client.put_weights(url, announcement(number), DiskSource()) for url in urls))

    try:
        return [await timed(push, number) for number in range(num_pushes)]
    finally:
        await client.close()


async def by_streams(ports: Sequence[int], num_pushes: int) -> list[tuple[float, float]]:
    """Without any library for HTTP."""
    streams: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}

    async def push_one(port: int, number: int) -> None:
        if port not in streams:
            streams[port] = await asyncio.open_connection(HOST, port)
        reader, writer = streams[port]
        body = json.dumps(push_body(announcement(number), DiskSource())).encode()
        writer.write(b"PUT /v1/weights/%d HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (number, len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        json.loads(await reader.readexactly(int(head.partition(b"length: ")[2])))

    async def push(number: int) -> None:
        await asyncio.gather(*(push_one(port, number) for port in ports))

    found = [await timed(push, number) for number in range(num_pushes)]
    for _, writer in streams.values():
        writer.close()
    return found


async def timed(push: Callable[[int], Awaitable[None]], number: int) -> tuple[float, float]:
    """CPU and wall milliseconds of a push."""
    cpu, wall = time.process_time(), time.perf_counter()
    await push(number)
    return 1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - wall)


def measure(num_servers: int) -> None:
    own, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(num_servers, other), daemon=True)
    process.start()
    other.close()
    ports = own.recv()
    for name, way in (("RolloutClient", by_client), ("asyncio alone", by_streams)):
        (first_cpu, first_wall), *later = asyncio.run(way(ports, 1 + LATER_PUSHES))
        cpu, wall = (median(each[place] for each in later) for place in (0, 1))
        print(f"| {num_servers} | {name} | {first_cpu:.0f} | {cpu:.0f} | {first_wall:.0f} | {wall:.0f} |", flush=True)
    own.close()
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", type=int, nargs="+", default=[64, 256, 1000])
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("| Servers | By | First push, CPU ms | Later ones, CPU ms | First, ms | Later, ms |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for number in arguments.servers:
        measure(number)


if __name__ == "__main__":
    main()

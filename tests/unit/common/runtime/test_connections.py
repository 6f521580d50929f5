"""How many connections a service holds, and for how long without a request."""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry

from penstock.runtime import connections
from penstock.runtime.http import make_app
from penstock.runtime.service import Service
from tests.patience import ANSWER_SECONDS

BIG_BYTES = 2**26


class Serving:
    """A service in this process, with routes that wait and one whose answer is long."""

    def __init__(self) -> None:
        self.service = Service("127.0.0.1", 0, "reward.port")
        self.url = self.service.url
        self.port = int(self.url.rpartition(":")[2])
        self.may_answer = asyncio.Event()
        self.num_waiting = 0
        self.app: FastAPI = make_app("test", not_ready=lambda: None, metrics=CollectorRegistry())

        @self.app.get("/wait")
        async def wait() -> str:
            self.num_waiting += 1
            await self.may_answer.wait()
            return "done"

        @self.app.get("/big")
        async def big() -> Response:
            return Response(b" " * BIG_BYTES)

        @self.app.get("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(b" " * 2**20 for _ in range(BIG_BYTES // 2**20))

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A request and its answer, after which the connection stays open."""
        writer.write(b"GET /health HTTP/1.1\r\nHost: t\r\n\r\n")
        async with asyncio.timeout(ANSWER_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        assert head.startswith(b"HTTP/1.1 200")

    async def is_alive(self) -> bool:
        async with httpx.AsyncClient(timeout=ANSWER_SECONDS) as client:
            return (await client.get(f"{self.url}/health")).status_code == 200


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Serving]:
    each = Serving()

    async def until_stopped() -> None:
        await each.service.stop.wait()

    running = asyncio.create_task(each.service.run(each.app, loop=until_stopped()))
    try:
        assert await each.is_alive()
        yield each
    finally:
        each.may_answer.set()
        each.service.stop.set()
        await running


async def left_of(reader: asyncio.StreamReader) -> bytes:
    """What still comes before the connection ends."""
    read = bytearray()
    async with asyncio.timeout(ANSWER_SECONDS):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**20):
                read += data
    return bytes(read)


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHost: t\r\nX: ",
        b"POST /nowhere HTTP/1.1\r\nHost: t\r\nContent-Length: 100\r\n\r\nnot all",  # answered, never finished
        b"GET /health HTTP/1.1\r\nHost: t\r\n\r\nGET /",
    ],
)
async def test_whoever_does_not_go_on_is_cut_off(monkeypatch: pytest.MonkeyPatch, beginning: bytes) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 1.0)
    async with serving() as each:
        reader, writer = await each.connect()
        writer.write(beginning)
        await left_of(reader)
        writer.close()


async def test_headers_that_trickle_do_not_prolong_their_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.5)
    async with serving() as each:
        reader, writer = await each.connect()
        writer.write(b"GET /health HTTP/1.1\r\n")
        ended = asyncio.create_task(left_of(reader))
        async with asyncio.timeout(ANSWER_SECONDS):
            while not ended.done():
                writer.write(b"X: y\r\n")
                await asyncio.sleep(0.05)
        assert await ended == b""
        writer.close()


async def test_headers_without_end_are_refused() -> None:
    async with serving() as each:
        reader, writer = await each.connect()
        writer.write(b"GET /health HTTP/1.1\r\n" + b"X: " + b"y" * 2**20)
        assert (await left_of(reader)).startswith(b"HTTP/1.1 400")
        writer.close()


@pytest.mark.parametrize("path", ["/big", "/stream"])
async def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.5)
    async with serving() as each:
        reader, writer = await each.connect()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: t\r\n\r\n".encode())
        assert await reader.read(9) == b"HTTP/1.1 "
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(1.5)
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert len(await left_of(reader)) < BIG_BYTES
        writer.close()


async def test_an_answer_that_is_read_slowly_is_sent_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 1.0)
    loop = asyncio.get_running_loop()
    async with serving() as each:
        reader, writer = await each.connect()
        writer.write(b"GET /stream HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
        num_read, began = 0, loop.time()
        while loop.time() < began + 2.0:
            num_read += len(await reader.readexactly(2**16))
            await asyncio.sleep(0.02)
        assert num_read < BIG_BYTES / 2
        assert num_read + len(await left_of(reader)) > BIG_BYTES
        writer.close()


async def test_a_request_may_take_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_SECONDS", 0.5)
    async with serving() as each, httpx.AsyncClient(timeout=ANSWER_SECONDS) as client:
        asking = asyncio.create_task(client.get(f"{each.url}/wait"))
        await asyncio.sleep(1.5)
        each.may_answer.set()
        assert (await asking).json() == "done"


@pytest.mark.parametrize("used", [False, True])
async def test_idle_connections_make_room_from_the_oldest(monkeypatch: pytest.MonkeyPatch, used: bool) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(connections, "IDLE_SECONDS", 10 * ANSWER_SECONDS)
    async with serving() as each:
        opened = [await each.connect() for _ in range(40)]
        if used:
            for connection in opened[-7:]:
                await each.ask(*connection)
        assert await each.is_alive()
        for reader, _ in opened[: 41 - 8]:
            assert await left_of(reader) == b""
        assert not opened[-1][0].at_eof()
        for _, writer in opened:
            writer.close()


async def test_if_all_are_busy_a_further_request_may_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    async with serving() as each, httpx.AsyncClient(timeout=ANSWER_SECONDS) as client:
        asking = [asyncio.create_task(client.get(f"{each.url}/wait")) for _ in range(2)]
        async with asyncio.timeout(ANSWER_SECONDS):
            while each.num_waiting < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await client.get(f"{each.url}/health")).status_code == 503
        each.may_answer.set()
        assert [answer.json() for answer in await asyncio.gather(*asking)] == ["done", "done"]


def test_a_service_of_clients_that_wait_long_may_hold_more() -> None:
    assert connections.connections_within(2**16, 2000) == connections.MAX_CONNECTIONS + 2000
    assert connections.connections_within(4096, 2000) == 1024


@pytest.mark.parametrize(("hard", "raised", "held"), [(100, 100, 25), (4096, 4096, 512), (10**6, 2**16, 512)])
def test_a_process_may_open_what_its_system_allows(hard: int, raised: int, held: int) -> None:
    code = (
        "import resource; from penstock.runtime.connections import *\n"
        f"hard = min({hard}, resource.getrlimit(resource.RLIMIT_NOFILE)[1])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, hard), hard))\n"
        "raise_file_limit()\n"
        "print(hard, *resource.getrlimit(resource.RLIMIT_NOFILE), max_connections())\n"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    allowed, soft, kept, most = map(int, output.stdout.split())
    assert (soft, kept, most) == (min(raised, allowed), allowed, held if allowed == hard else most)

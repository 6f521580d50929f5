"""A gateway on loopback, and what may lie between it and a client."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import SecretStr

from penstock.runtime.service import Service
from tests.patience import ANSWER_SECONDS
from tests.unit.agent.gateway.pretend import PretendGateway

TOKEN = SecretStr("the run's own")


@contextlib.asynccontextmanager
async def serving(**gateway: Any) -> AsyncIterator[PretendGateway]:
    """A gateway that listens, with the run's token set."""
    service = Service("127.0.0.1", 0, "agent.port", num_clients=4096)
    made = PretendGateway(service.url, token=TOKEN, **gateway)

    async def until_stopped() -> None:
        await service.stop.wait()

    running = asyncio.create_task(service.run(made.app, loop=until_stopped()))
    try:
        yield made
    finally:
        made.servers.gate.set()
        service.stop.set()
        await running


Cut = Literal["during the wait", "after the answer"]


class CuttingProxy:
    """Passes bytes on; the first connections of its clients are cut."""

    def __init__(self, url: str, cut: Cut, num_cut: int = 1) -> None:
        self._port = int(url.rpartition(":")[2].partition("/")[0])
        self._cut = cut
        self._num_left = num_cut
        self.request_passed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
        cut = self._num_left > 0
        self._num_left -= cut
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                if cut:
                    server_writer.write(await _message(reader))
                    if self._cut == "during the wait":
                        self.request_passed.set()
                    else:
                        await _message(to)
                else:
                    await asyncio.gather(_pass(reader, server_writer), _pass(to, writer))
        finally:
            for each in (writer, server_writer):
                each.close()


async def _message(reader: asyncio.StreamReader) -> bytes:
    """A request or an answer with its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head + await reader.readexactly(length)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(2**16):
        writer.write(data)
    writer.close()

"""Pushes to real HTTP servers: the effect of each answer on its server."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry

from penstock.broker import Queue
from penstock.config import Config
from penstock.contracts import PolicyIdentity, ServiceKind
from penstock.contracts.canary import Canary
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.runtime.http import make_app
from penstock.runtime.service import Service
from penstock_trainer.weight_sync import rollout_client
from penstock_trainer.weight_sync.disk import DiskTransport
from penstock_trainer.weight_sync.publisher import Publisher
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weights.staging import Staging
from tests.patience import ANSWER_SECONDS

IDENTITY = PolicyIdentity(3, "abcdef0123456789")
WANTED = Announcement(IDENTITY, "/weights/3", 7, Canary((4, 5), (-1.5,), 0.002))
SERVED = {
    "policy_version": 3,
    "checksum": IDENTITY.digest,
    "paused_seconds": 0.5,
    "state": "serving",
    "engine": "sglang 0.5",
    "engine_starts": 1,
    "engine_device": "cpu",
    "engine_num_ranks": 1,
}


@dataclass
class Server:
    """Answers pushes with `answers` in turn, and repeats the last one."""

    answers: list[Response]
    seen: list[tuple[str, Any, str]] = field(default_factory=list)
    delay_seconds: float = 0.0

    def app(self) -> FastAPI:
        app = make_app("fake", not_ready=lambda: None, metrics=CollectorRegistry())

        @app.put("/v1/weights/{version}")
        async def put(version: str, request: Request) -> Response:
            self.seen.append((version, await request.json(), request.headers.get("authorization", "")))
            await asyncio.sleep(self.delay_seconds)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

        return app

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        service = Service("127.0.0.1", 0, "port")
        running = asyncio.create_task(service.run(self.app(), until=_until(service.stop)))
        try:
            yield service.url
        finally:
            service.stop.set()
            await running


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


@dataclass
class Registry:
    """The part of the queue that a publisher reads."""

    records: list[ServiceRecord]

    async def services(self) -> list[ServiceRecord]:
        return self.records


def config(timeout_seconds: float = ANSWER_SECONDS) -> Config:
    return Config.model_validate(
        {
            "actor": {"path": "m"},
            "data": {"train": {"path": "d"}},
            "weights": {"push_timeout_seconds": timeout_seconds},
            "token": "t0ken",
        }
    )


def rollout(url: str, name: str = "r", state: str = "serving") -> ServiceRecord:
    return ServiceRecord(ServiceKind.ROLLOUT, name, url, 1, state)


async def push(
    records: list[ServiceRecord], timeout_seconds: float = ANSWER_SECONDS
) -> tuple[tuple[str, ...], dict[str, str]]:
    transport = DiskTransport(cast(Staging, None))  # it is never used: the announcement names the folder
    client = RolloutClient(config(timeout_seconds))
    publisher = Publisher(cast(Queue, Registry(records)), client, transport, timeout_seconds)
    try:
        result = await publisher.push(WANTED)
    finally:
        await client.close()
    return result.live, result.fenced


async def test_a_server_that_serves_the_version_is_live() -> None:
    server = Server([JSONResponse(SERVED)])
    async with server.serving() as url:
        assert await push([rollout(url)]) == (("r",), {})
    body = {
        "digest": IDENTITY.digest,
        "path": "/weights/3",
        "lease": 7,
        "source": {"transport": "disk"},
        "canary": {"token_ids": [4, 5], "logprobs": [-1.5], "tolerance": 0.002},
    }
    assert server.seen == [("3", body, "Bearer t0ken")]


async def test_a_busy_server_is_asked_again() -> None:
    busy = JSONResponse({"error": "weights_busy", "detail": "later"}, status_code=503)
    server = Server([busy, JSONResponse(SERVED)])
    async with server.serving() as url:
        assert await push([rollout(url)]) == (("r",), {})
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (JSONResponse({"detail": "lease 7 is lower than 8"}, status_code=409), "HTTP 409: .*lease 7 is lower"),
        (JSONResponse({"detail": "corrupt"}, status_code=422), "HTTP 422: .*corrupt"),
        (JSONResponse({**SERVED, "policy_version": 2}), "it serves 2-abcdef0123456789, not 3-abcdef0123456789"),
        (JSONResponse({**SERVED, "checksum": "0" * 16}), "it serves 3-0{16}, not 3-abcdef0123456789"),
        (Response("a proxy says hello"), "its answer is 'a proxy says hello'; expected policy_version"),
        (JSONResponse([1]), r"its answer is '\[1\]'"),
        (JSONResponse({"policy_version": 3}), "missing required field `checksum`"),
        (JSONResponse({**SERVED, "state": "dreaming"}), "Invalid enum value 'dreaming'"),
    ],
)
async def test_any_other_answer_fences_the_server(answer: Response, reason: str) -> None:
    async with Server([answer]).serving() as url:
        live, fenced = await push([rollout(url)])
    assert live == ()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(fenced["r"])


async def test_a_server_that_does_not_answer_in_time_is_fenced_and_others_are_live() -> None:
    slow, quick = Server([JSONResponse(SERVED)], delay_seconds=4), Server([JSONResponse(SERVED)])
    async with slow.serving() as slow_url, quick.serving() as url:
        records = [rollout(slow_url, "slow"), rollout(url, "quick"), rollout("http://127.0.0.1:1", "gone")]
        live, fenced = await push(records, timeout_seconds=3)
    assert live == ("quick",)
    assert "weights.push_timeout_seconds" in fenced["slow"]
    assert fenced["gone"].startswith("ConnectError")


@pytest.mark.parametrize("each", [0.0, ANSWER_SECONDS])
async def test_each_server_gives_all_of_them_more_time_to_be_connected_to(
    each: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand are connected to at once by an event loop that may be busy."""
    monkeypatch.setattr(rollout_client, "CONNECT_SECONDS", 0.0)
    monkeypatch.setattr(rollout_client, "CONNECT_SECONDS_EACH", each)
    async with Server([JSONResponse(SERVED)]).serving() as url:
        assert await push([rollout(url)]) == ((("r",), {}) if each else ((), {"r": "ConnectTimeout"}))


async def test_only_rollout_servers_with_an_engine_are_pushed_to() -> None:
    nowhere = "http://127.0.0.1:1"
    reward = ServiceRecord(ServiceKind.REWARD, "w", nowhere, 1, "ready")
    records = [rollout(nowhere, "a", "starting"), rollout(nowhere, "b", "asleep"), reward]
    assert await push(records) == ((), {})


async def test_a_push_wakes_an_engine_that_sleeps() -> None:
    server = Server([JSONResponse(SERVED)])
    async with server.serving() as url:
        record = ServiceRecord(ServiceKind.ROLLOUT, "r", url, 1, "asleep", engine="sglang 0.5")
        assert await push([record]) == (("r",), {})


async def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    async with Server([JSONResponse(SERVED)]).serving() as url:
        assert await push([rollout(url)]) == (("r",), {})


async def test_each_server_keeps_its_connection_from_push_to_push_until_it_is_gone() -> None:
    opened: list[tuple[str, asyncio.StreamWriter]] = []
    body = json.dumps(SERVED).encode()

    def answering(name: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            opened.append((name, writer))
            with contextlib.suppress(asyncio.IncompleteReadError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            writer.close()

        return answer

    async with contextlib.AsyncExitStack() as stack:
        records = []
        for name in ("stays", "goes"):
            server = await stack.enter_async_context(await asyncio.start_server(answering(name), "127.0.0.1", 0))
            records.append(rollout(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", name))
        registry, client = Registry(records), RolloutClient(config())
        stack.push_async_callback(client.close)
        publisher = Publisher(cast(Queue, registry), client, DiskTransport(cast(Staging, None)), ANSWER_SECONDS)
        for _ in range(2):
            assert (await publisher.push(WANTED)).live == ("stays", "goes")
        registry.records = records[:1]
        assert (await publisher.push(WANTED)).live == ("stays",)
        assert sorted(name for name, _ in opened) == ["goes", "stays"]
        async with asyncio.timeout(ANSWER_SECONDS):
            await dict(opened)["goes"].wait_closed()
        assert not dict(opened)["stays"].is_closing()

"""Bodies of requests: bounded in bytes and in time, and only JSON that can be written again."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry

from penstock.runtime import bodies
from penstock.runtime.bodies import MAX_BODY_BYTES
from penstock.runtime.http import make_app

LONG = 2**20


def make_test_app() -> FastAPI:
    app = make_app("test", not_ready=lambda: None, metrics=CollectorRegistry(), body_bytes={"/long/{name}": LONG})

    @app.post("/long/{name}")
    @app.post("/short")
    async def take(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @app.post("/none")
    async def none() -> None:
        return

    @app.post("/raw")
    async def raw(request: Request) -> Response:
        return Response(await request.body())

    return app


def client() -> httpx.AsyncClient:
    headers = {"Content-Type": "application/json"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(make_test_app()), base_url="http://t", headers=headers)


class Chunks:
    """A body without a declared length; counts what was read of it."""

    def __init__(self, total_bytes: int, *, then_waits: bool = False) -> None:
        self.num_read = 0
        self._total = total_bytes
        self._waits = then_waits

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(0, self._total, 1024):
            self.num_read += 1024
            yield b" " * 1024
        if self._waits:
            await asyncio.Event().wait()


@pytest.mark.parametrize(("path", "limit"), [("/short", MAX_BODY_BYTES), ("/long/x", LONG)])
async def test_each_route_has_its_limit(path: str, limit: int) -> None:
    async with client() as http:
        fits = b'{"a": "' + b"x" * (limit - 9) + b'"}'
        assert len(fits) == limit
        assert (await http.post(path, content=fits)).status_code == 200
        declared = await http.post(path, content=fits + b" ")
        assert (declared.status_code, declared.json()["error"]) == (413, "refused")
        assert f"the body has {limit + 1} bytes; expected at most {limit} here" in declared.json()["detail"]
        chunks = Chunks(10 * limit)
        assert (await http.post(path, content=chunks)).status_code == 413
        assert chunks.num_read <= limit + 2 * 1024


async def test_a_declared_length_is_refused_before_it_is_read() -> None:
    async with client() as http:
        chunks = Chunks(10 * LONG)
        answer = await http.post("/short", content=chunks, headers={"Content-Length": str(10 * LONG)})
    assert (answer.status_code, chunks.num_read) == (413, 0)


async def test_a_body_that_is_not_asked_for_is_not_read() -> None:
    async with client() as http:
        chunks = Chunks(10 * LONG)
        assert (await http.post("/none", content=chunks)).status_code == 200
    assert chunks.num_read == 0


async def test_a_body_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    async with client() as http:
        answer = await http.post("/short", content=Chunks(1024, then_waits=True))
    assert (answer.status_code, answer.json()["error"]) == (408, "refused")


@pytest.mark.parametrize("path", ["/raw", "/short"])
async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(path: str) -> None:
    """One that nobody catches would be a traceback in the log for each call of a killed service."""
    messages: list[MutableMapping[str, Any]] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        **{"type": "http", "method": "POST", "path": path, "query_string": b"", "http_version": "1.1"},
        **{"headers": [(b"host", b"t"), (b"content-type", b"application/json")], "client": ("127.0.0.1", 5)},
    }
    await make_test_app()(scope, receive, send)
    assert sent[0]["status"] == 499


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": "\xff"}',
        b'{"a": ' + b"[" * 30000 + b"]" * 30000 + b"}",
        b"\x80\x04",
    ],
)
async def test_json_that_could_not_be_written_again_is_the_callers_mistake(body: bytes) -> None:
    async with client() as http:
        answer = await http.post("/short", content=body)
    assert answer.status_code == 422
    assert answer.json()["detail"]


async def test_any_other_json_is_taken_as_it_is() -> None:
    body = '{"a": "\U0001f600 \\u0000", "b": [1, 2.5, true, null, 123456789012345678901234567890]}'
    async with client() as http:
        answer = await http.post("/short", content=body.encode())
    assert answer.json() == {"a": "\U0001f600 \0", "b": [1, 2.5, True, None, 123456789012345678901234567890]}

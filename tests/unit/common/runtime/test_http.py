"""The answers that all services share: health, readiness, metrics, errors, token."""

import socket
from typing import NoReturn

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter
from pydantic import SecretStr

from penstock.errors import (
    ConfigError,
    EngineDiedError,
    LeaseLostError,
    PenstockError,
    RewardError,
    WeightsBusyError,
    WeightsConflictError,
    WeightsError,
)
from penstock.runtime.http import auth_headers, make_app, transport_fault

TOKEN = SecretStr("s3cret")


class Served:
    """An app, and requests to it."""

    def __init__(self, token: SecretStr | None = TOKEN) -> None:
        self.reason: str | None = "the engine is being started"
        self.error: Exception = PenstockError("none")
        registry = CollectorRegistry()
        Counter("penstock_things", "Things", registry=registry).inc(3)
        self.app: FastAPI = make_app("test", not_ready=lambda: self.reason, metrics=registry, token=token)

        @self.app.get("/fail")
        async def fail() -> None:
            raise self.error

        @self.app.post("/act")
        async def act(count: int) -> dict[str, int]:
            return {"count": count}

    async def ask(self, method: str, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://t") as client:
            return await client.request(method, path, headers=headers)


async def test_health_readiness_and_metrics() -> None:
    served = Served()
    assert (await served.ask("GET", "/health")).json() == {"status": "alive"}
    waiting = await served.ask("GET", "/ready")
    assert (waiting.status_code, waiting.json()["detail"]) == (503, "the engine is being started")
    assert waiting.headers["retry-after"]
    served.reason = None
    assert (await served.ask("GET", "/ready")).status_code == 200
    assert "penstock_things_total 3.0" in (await served.ask("GET", "/metrics")).text


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (WeightsConflictError("x"), 409, "weights_conflict"),
        (LeaseLostError("x"), 409, "fenced"),
        (WeightsBusyError("x"), 503, "weights_busy"),
        (WeightsError("x"), 422, "weights"),
        (EngineDiedError("x"), 502, "engine_died"),
        (RewardError("x"), 422, "reward"),
        (ConfigError("x"), 422, "config"),
        (TimeoutError("x"), 504, "timeout"),
        (PenstockError("x"), 500, "error"),
    ],
)
async def test_errors_have_one_form(error: Exception, status: int, kind: str) -> None:
    served = Served()
    served.error = error
    answer = await served.ask("GET", "/fail")
    assert (answer.status_code, answer.json()) == (status, {"error": kind, "detail": "x"})
    assert ("retry-after" in answer.headers) == (status == 503)


async def test_unknown_paths_and_wrong_parameters_have_that_form_too() -> None:
    served = Served(token=None)
    missing = await served.ask("GET", "/nowhere")
    assert (missing.status_code, missing.json()) == (404, {"error": "refused", "detail": "Not Found"})
    wrong = await served.ask("POST", "/act?count=many")
    assert wrong.status_code == 422
    assert wrong.json()["error"] == "invalid_request"
    assert "query.count" in wrong.json()["detail"]


async def test_the_token_is_needed_where_one_is_set() -> None:
    served = Served()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
        answer = await served.ask("POST", "/act?count=1", headers)
        assert answer.status_code == 401
        assert "PENSTOCK_TOKEN" in answer.json()["detail"]
    assert (await served.ask("POST", "/act?count=1", auth_headers(TOKEN))).json() == {"count": 1}
    assert auth_headers(None) == {}
    assert (await Served(token=None).ask("POST", "/act?count=1")).status_code == 200


async def test_a_request_that_failed_is_told_without_the_librarys_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats the header: with the token in it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        async with httpx.AsyncClient(headers={"Authorization": "Bearer hush\ntoken"}) as client:
            with pytest.raises(httpx.LocalProtocolError, match="hush") as caught:
                await client.get(f"http://127.0.0.1:{port}")
    assert transport_fault(caught.value) == "LocalProtocolError"
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ConnectError) as refused:
            await client.get(f"http://127.0.0.1:{port}")
        monkeypatch.setattr(socket, "getaddrinfo", no_such_host)  # a real resolver may take longer than the client
        with pytest.raises(httpx.ConnectError) as unknown:
            await client.get("http://no-such-host.invalid")
    assert transport_fault(refused.value) == "ConnectError (Connection refused)"
    assert transport_fault(unknown.value) == "ConnectError (no such host)"


def no_such_host(*_: object, **__: object) -> NoReturn:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

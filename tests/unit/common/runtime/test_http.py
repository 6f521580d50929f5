"""The answers that all services share: health, readiness, metrics, errors, token."""

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
from penstock.runtime.http import make_app
from penstock.runtime.requests import auth_headers

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

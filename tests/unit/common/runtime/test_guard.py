"""Who may call a service, decided before a byte of the body is read."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.runtime.http import make_app
from penstock.runtime.requests import auth_headers
from penstock.runtime.service import Service
from tests.patience import ANSWER_SECONDS

TOKEN = SecretStr("s3cret")
PAGE = {"Origin": "http://evil.example"}


def app(token: SecretStr | None) -> FastAPI:
    made = make_app("test", not_ready=lambda: None, metrics=CollectorRegistry(), token=token)

    @made.post("/v1/stop")
    async def stop() -> str:
        return "stopped"

    @made.put("/v1/weights")
    async def put(body: dict[str, Any]) -> dict[str, Any]:
        return body

    return made


async def status(token: SecretStr | None, method: str, path: str, headers: dict[str, str], body: str = "") -> int:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app(token)), base_url="http://t") as client:
        return (await client.request(method, path, headers=headers, content=body.encode())).status_code


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", ["/v1/stop", "/v1/weights", "/nowhere"])
async def test_whatever_is_no_read_needs_the_token(method: str, path: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer guess"},
        {"Authorization": "s3cret"},
    ):
        assert await status(TOKEN, method, path, headers) == 401
    assert await status(TOKEN, method, path, auth_headers(TOKEN)) in (200, 404, 405, 422)
    assert await status(None, method, path, {}) in (200, 404, 405, 422)


@pytest.mark.parametrize("token", [TOKEN, None])
async def test_a_path_with_a_key_of_its_own_needs_no_token(token: SecretStr | None) -> None:
    made = make_app("test", not_ready=lambda: None, metrics=CollectorRegistry(), token=token, own_keys=("/v1/", "/s/"))

    @made.post("/v1/chat")
    async def chat() -> str:
        return "open"

    @made.post("/v2/stop")
    async def stop() -> str:
        return "stopped"

    async def asked(path: str, kind: str = "application/json", **headers: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url="http://t") as client:
            return (await client.post(path, headers={"Content-Type": kind, **headers})).status_code

    assert await asked("/v1/chat", Authorization="Bearer psk_1") == 200
    assert await asked("/v1/chat", **PAGE) == 200  # a page has no key, and the app refuses whoever has none
    assert await asked("/v1/chat", kind="text/plain") == 415
    assert await asked("/v2/stop", Authorization="Bearer psk_1") == (200 if token is None else 401)
    assert await asked("/v2/stop", **PAGE) == (403 if token is None else 401)


@pytest.mark.parametrize("length", ["5", str(10**9)])
async def test_without_the_token_no_byte_of_a_body_is_read(length: str) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was asked for")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"t"), (b"content-type", b"application/json"), (b"content-length", length.encode())]
    headers.append((b"authorization", b"Bearer \xff"))
    scope = {"type": "http", "method": "PUT", "path": "/v1/weights", "query_string": b"", "headers": headers}
    await app(TOKEN)(scope, receive, send)
    assert sent[0]["status"] == 401


@pytest.mark.parametrize(
    "headers",
    [
        PAGE,
        {"Origin": "null"},  # of a page in a sandbox, or of a file
        {"Origin": "http://t"},  # of a page whose name leads here
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-origin"},
    ],
)
async def test_a_page_in_a_browser_changes_nothing_where_no_token_is_set(headers: dict[str, str]) -> None:
    assert await status(None, "POST", "/v1/stop", headers) == 403
    assert await status(None, "PUT", "/v1/weights", headers, "{}") == 403
    assert await status(TOKEN, "POST", "/v1/stop", headers) == 401
    assert await status(TOKEN, "POST", "/v1/stop", {**headers, **auth_headers(TOKEN)}) == 200
    assert await status(None, "GET", "/health", headers) == 200


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
async def test_what_a_form_can_send_is_no_body(kind: str, expected: int) -> None:
    """Forms are sent by any page; old browsers do not say that one sent it."""
    assert await status(None, "PUT", "/v1/weights", {"Content-Type": kind}, "{}") == expected
    assert await status(None, "POST", "/v1/stop", {"Content-Type": kind}) == expected


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:80", 200),
        ("10.1.2.3:80", 200),
        ("[::1]:80", 200),
        ("localhost", 200),
        ("rollout:8000", 200),  # of a container
        ("node-7.cluster:80", 200),  # advertised
        ("Node-7.Cluster.", 200),
        ("evil.example", 421),
        ("evil.example:80", 421),
        ("127.0.0.1.evil.example", 421),
    ],
)
async def test_only_its_own_names_reach_a_service(host: str, expected: int) -> None:
    service = Service("127.0.0.1", 0, "reward.port")
    url = service.url
    service.advertise("Node-7.cluster")

    async def ask() -> None:
        async with httpx.AsyncClient(base_url=url, headers={"Host": host}, timeout=ANSWER_SECONDS) as client:
            for answer in (await client.get("/health"), await client.post("/v1/stop")):
                assert answer.status_code == expected
                if expected == 421:
                    assert "evil.example" in answer.json()["detail"]
                    assert "reward.advertise_host" in answer.json()["detail"]
        service.stop.set()

    await service.run(app(None), ask=ask())

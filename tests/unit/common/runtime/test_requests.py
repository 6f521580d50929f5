"""What a client says of a request that got no answer."""

import socket
from typing import NoReturn

import httpx
import pytest

from penstock.runtime.requests import transport_fault


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

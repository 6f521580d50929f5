"""How a service runs, ends and fails: one error, never a half-dead process."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from penstock.config import Config
from penstock.errors import ConfigError, EngineStartError, PenstockError
from penstock.runtime.http import make_app
from penstock.runtime.service import UNEXPECTED_EXIT_CODE, Service, main


@pytest.fixture
def service() -> Service:
    return Service("127.0.0.1", 0, "trainer.port")


def web() -> FastAPI:
    return make_app("test", not_ready=lambda: None, metrics=CollectorRegistry())


async def for_ever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append("background")


async def test_an_answer_is_sent_at_once(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and body are two packets: the second must not wait until the first is acknowledged."""
    accepted: list[socket.socket] = []
    connected = AutoHTTPProtocol.connection_made

    def connection_made(self: Any, transport: asyncio.Transport) -> None:
        accepted.append(transport.get_extra_info("socket"))
        connected(self, transport)

    monkeypatch.setattr(AutoHTTPProtocol, "connection_made", connection_made)

    async def ask() -> None:
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{service.url}/health")).status_code == 200
        assert [each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in accepted] == [1]
        service.stop.set()

    await service.run(web(), ask=ask())


async def test_stop_ends_the_loops_then_the_background_then_the_server(service: Service) -> None:
    order: list[str] = []

    async def loop() -> None:
        await service.stop.wait()
        async with httpx.AsyncClient() as client:
            assert (await client.get(service.url + "/health")).status_code == 200  # the server ends last
        assert order == []
        order.append("loop")

    async def stop_soon() -> None:
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    await service.run(web(), background=[for_ever(order)], loop=loop(), stop_soon=stop_soon())
    assert order == ["loop", "background"]


@pytest.mark.parametrize("where", ["loop", "background"])
async def test_the_first_error_ends_everything_and_is_raised(service: Service, where: str) -> None:
    async def fail() -> None:
        raise EngineStartError("it does not start")

    ended: list[str] = []
    if where == "loop":
        running = service.run(web(), background=[for_ever(ended)], fail=fail(), other=for_ever(ended))
    else:
        running = service.run(web(), background=[for_ever(ended), fail()], other=for_ever(ended))
    with pytest.raises(EngineStartError, match="it does not start"):
        await running
    assert set(ended) == {"background"}
    with socket.create_server(("127.0.0.1", int(service.url.rpartition(":")[2]))):
        pass  # the port is free again


async def test_a_background_loop_that_returns_is_an_error(service: Service) -> None:
    async def returns() -> None:
        return

    with pytest.raises(PenstockError, match="ended by itself"):
        await service.run(web(), background=[returns()], other=for_ever([]))


async def test_an_occupied_port_names_its_key(service: Service) -> None:
    port = int(service.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"reward.port: cannot listen on 127.0.0.1:{port} .*expected a free port"):
        Service("127.0.0.1", port, "reward.port")
    with pytest.raises(ConfigError, match=r"reward.port: cannot listen on no.such.host.invalid"):
        Service("no.such.host.invalid", 0, "reward.port")

    async def nothing() -> None:
        return

    await service.run(web(), nothing=nothing())  # releases the port


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text("actor: {path: m}\ndata: {train: {path: d}}\n")
    return ["--config", str(path)]


def exit_code(start: object, arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as ended:
        main("reward", start, arguments)  # type: ignore[arg-type]
    return ended.value.code


def test_main_maps_errors_to_one_line_and_an_exit_code(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    async def works(config: Config) -> None:
        assert config.actor.path == "m"

    async def fails(config: Config) -> None:
        raise EngineStartError("SGLang ended with code 1")

    async def breaks(config: Config) -> None:
        raise ZeroDivisionError("a defect")

    assert exit_code(works, arguments) == 0
    assert capsys.readouterr().err == ""
    assert exit_code(fails, arguments) == EngineStartError.exit_code
    assert capsys.readouterr().err == "reward: engine_start: SGLang ended with code 1\n"
    assert exit_code(works, [*arguments, "--actor.pth", "x"]) == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("reward: config: actor.pth: no such key in the command line")
    assert exit_code(breaks, arguments) == UNEXPECTED_EXIT_CODE
    assert "ZeroDivisionError: a defect" in capsys.readouterr().err

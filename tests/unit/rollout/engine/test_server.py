"""Starting, watching and ending the engine's processes, with a script instead of SGLang's Python."""

import asyncio
import gc
import os
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from penstock.config import EngineSection
from penstock.errors import EngineError, EngineStartError, TransientStartError
from penstock_rollout.engine import engine as engine_module
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.engine.sglang.server import GivenServer, StartedServer, hold_port, make_server, probe_python
from tests.patience import ANSWER_SECONDS, START_SECONDS

PROBE_SECONDS = 5.0  # for a shell to begin, under load
# Answers the probe; then serves /model_info with a child process, or does what the test asks for.
SERVER = """
import http.server, pathlib, subprocess, sys
if sys.argv[1] == "-c":
    print('["0.5.21", false]')
    sys.exit()
{before}
child = subprocess.Popen(["sleep", "300"])
pathlib.Path({pids!r}).write_text(f"{{child.pid}}")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{{}}")
    def log_message(self, *_): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
# Ends the start if the port is free for a process that is not aware of its holder.
TAKES_THE_PORT = """
import socket
with socket.socket() as other:
    try:
        other.bind(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])))
    except OSError:
        pass
    else:
        sys.exit("nobody held the port")
"""
Make = Callable[[str, float], StartedServer]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[StartedServer] = []

    def make_one(before: str = "", start_timeout_seconds: float = START_SECONDS) -> StartedServer:
        script = tmp_path / "python"
        script.write_text(f"#!{sys.executable}\n" + SERVER.format(before=before, pids=str(tmp_path / "child")))
        script.chmod(script.stat().st_mode | stat.S_IEXEC)
        section = EngineSection(python=str(script), start_timeout_seconds=start_timeout_seconds)
        made.append(StartedServer(section, "model", tmp_path / "logs" / "engine.log"))
        return made[-1]

    yield make_one
    for server in made:
        await server.stop()


async def gone(pid: int) -> bool:
    """Whether a process ends."""
    deadline = asyncio.get_running_loop().time() + ANSWER_SECONDS
    while asyncio.get_running_loop().time() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        await asyncio.sleep(0.02)
    return False


async def test_it_starts_and_ends_with_all_its_children(make: Make, tmp_path: Path) -> None:
    server = make("", START_SECONDS)
    others = set(psutil.Process().children(recursive=True))  # from earlier tests
    await server.start()
    assert server.url.startswith("http://127.0.0.1:")
    child = int((tmp_path / "child").read_text())
    assert psutil.pid_exists(child)
    await server.stop()
    assert await gone(child)
    left = set(psutil.Process().children(recursive=True)) - others
    assert [each for each in left if each.status() != psutil.STATUS_ZOMBIE] == []


async def test_a_death_is_noticed_and_a_stop_is_none(make: Make, tmp_path: Path) -> None:
    server = make("print('my last words', flush=True)", START_SECONDS)
    await server.start()
    died = asyncio.create_task(server.died())
    assert server._process is not None
    os.kill(server._process.pid, 9)
    reason = await asyncio.wait_for(died, ANSWER_SECONDS)
    assert "code -9" in reason
    assert "my last words" in reason
    os.kill(int((tmp_path / "child").read_text()), 9)  # SGLang's own children are tied to their parent
    await server.start()
    died = asyncio.create_task(server.died())
    await asyncio.sleep(0)
    await server.stop()
    await asyncio.sleep(0.05)
    assert not died.done()
    died.cancel()


async def test_an_engine_that_ends_at_once_shows_the_end_of_its_log(make: Make) -> None:
    with pytest.raises(TransientStartError, match=r"code 7(.|\n)*no such model"):
        await make("print('no such model', flush=True); sys.exit(7)", START_SECONDS).start()


@pytest.mark.parametrize("end", ["import os; os.kill(os.getpid(), 9)", "print('no memory', flush=True); sys.exit(1)"])
async def test_an_engine_that_ends_while_it_starts_is_started_again(
    make: Make, tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end says nothing of the next start, unless it comes every time."""
    monkeypatch.setattr(engine_module, "FIRST_WAIT_SECONDS", 0.01)
    once = f"mark = pathlib.Path({str(tmp_path / 'mark')!r})\nif not mark.exists(): mark.touch(); {end}"
    engine = Engine(make(once, START_SECONDS), SGLangClient(EngineSection()), start_attempts=2)
    with pytest.raises(EngineError, match="does not describe itself"):  # a server answers, if no SGLang
        await engine._start(lambda: None)
    assert str(engine.not_ready).startswith("the engine is being started again: SGLang ended with code ")
    always = Engine(make(end, START_SECONDS), SGLangClient(EngineSection()), start_attempts=2)
    with pytest.raises(EngineStartError, match=r"2 times in a row \(rollout\.engine\.start_attempts\)") as caught:
        await always._start(lambda: None)
    assert not isinstance(caught.value, TransientStartError)


async def test_each_start_has_a_port_of_its_own_and_a_fixed_one_that_is_taken_is_named(make: Make) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(TransientStartError, match=rf"rollout\.engine\.port: no engine .*127\.0\.0\.1:{port}"):
            hold_port(port)
    server = make(TAKES_THE_PORT, START_SECONDS)
    await server.start()
    first = server.url
    with socket.socket() as other:
        await server.stop()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections to the server linger there
        other.bind(("127.0.0.1", int(first.rpartition(":")[2])))
        other.listen()
        await server.start()
        assert server.url != first
        await server.stop()


async def test_an_engine_that_never_answers_names_the_key(make: Make) -> None:
    with pytest.raises(EngineStartError, match=r"rollout\.engine\.start_timeout_seconds = 0\.5"):
        await make("import time; time.sleep(60)", 0.5).start()


@pytest.mark.parametrize(
    ("python", "match"),
    [("does/not/exist", "is no executable"), (sys.executable, "has no package `sglang`"), ("true", "does not work")],
)
async def test_a_python_without_sglang_names_the_key(tmp_path: Path, python: str, match: str) -> None:
    server = make_server(EngineSection(python=python), "model", tmp_path / "log")
    with pytest.raises(EngineStartError, match=match) as caught:
        await server.start()
    assert "rollout.engine.python" in str(caught.value)


def test_a_python_that_never_answers_is_ended_before_the_loop_that_asked_it(tmp_path: Path) -> None:
    """A transport that outlived its loop would print a traceback when it is collected; pytest makes that an error."""
    pid_file = tmp_path / "pid"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {pid_file}\nexec sleep 300\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)

    with pytest.raises(EngineStartError, match=r"does not work as a Python interpreter: no answer within"):
        asyncio.run(probe_python(str(python), "cpu", PROBE_SECONDS))
    gc.collect()
    assert not psutil.pid_exists(int(pid_file.read_text()))


async def test_temporary_files_of_an_engine_end_with_it_however_it_ends(make: Make, tmp_path: Path) -> None:
    writes = (
        "import os, tempfile\n"
        "file = tempfile.NamedTemporaryFile(delete=False)\n"
        f"pathlib.Path({str(tmp_path / 'folders')!r}).open('a').write(os.environ['TMPDIR'] + chr(10))\n"
    )
    server = make(writes, START_SECONDS)
    await server.start()
    await server.start()
    os.kill(server.pid, signal.SIGKILL)
    await server.died()
    await server.stop()
    with pytest.raises(TransientStartError):
        await make(writes + "sys.exit(3)", START_SECONDS).start()
    folders = (tmp_path / "folders").read_text().split()
    assert len(set(folders)) == 3
    assert not any(map(os.path.exists, folders))


async def test_an_engine_without_room_for_its_cache_says_whose_memory_it_was(make: Make) -> None:
    """SGLang speaks of a GPU there, on a CPU too."""
    words = "ValueError: Loaded weights leave no GPU memory for the KV cache under ..."
    server = make(f"sys.exit({words!r})", START_SECONDS)
    with pytest.raises(TransientStartError, match=r"other processes took more .* raise that key; the end of"):
        await server.start()


async def test_a_given_server_must_answer(tmp_path: Path) -> None:
    server = make_server(EngineSection(url="http://127.0.0.1:1/", start_timeout_seconds=0.3), "model", tmp_path / "log")
    assert isinstance(server, GivenServer)
    with pytest.raises(EngineStartError, match=r"rollout\.engine\.url"):
        await server.start()


def test_a_held_port_is_given_to_nobody_else_and_the_engine_may_listen_there() -> None:
    with hold_port(0) as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))  # like a process that is not aware of the holder
        with socket.socket() as engine:
            engine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like asyncio and uvicorn
            engine.bind(("127.0.0.1", port))
            engine.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS):
                pass

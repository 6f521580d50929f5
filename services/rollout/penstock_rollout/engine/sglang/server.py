"""The SGLang server: either this service starts and owns it, or its URL is given.

Owns the server's process tree. Invariant: the tree ends with this service, however the service ends (the first process
is tied to this one, every other process to its parent), and the server's death is detected at once.
"""

import asyncio
import contextlib
import errno
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import httpx

from penstock.absent_path import looked_for
from penstock.config import EngineSection
from penstock.config.secrets import shown_url
from penstock.contracts import PauseMode
from penstock.errors import EngineDiedError, EngineStartError, TransientStartError
from penstock.runtime.process import ProcessIdentity, tied_command
from penstock_rollout.engine.interface import EngineServer
from penstock_rollout.engine.sglang.arguments import command, environment
from penstock_rollout.engine.sglang.leftovers import files_of, kill_and_clear
from penstock_rollout.engine.sglang.own_folder import OwnFolder

TESTED_VERSIONS = ("0.5.21", "0.5.23")  # of SGLang: those that `penstock envs` installs for CPUs and for GPUs
PROBE = (
    "import importlib.metadata as m, importlib.util as u, json, sys\n"
    "version = m.version('sglang') if u.find_spec('sglang') else ''\n"
    "cuda = sys.argv[1] == 'auto' and bool(u.find_spec('torch')) and __import__('torch').cuda.is_available()\n"
    "print(json.dumps([version, cuda]))\n"
)
PROBE_TIMEOUT_SECONDS = 120  # a cold import of torch from a network disk
READY_POLL_SECONDS = 0.25
KILL_SECONDS = 5.0  # a process in a system call ends after it
STOP_GRACE_SECONDS = 2.0  # SGLang has nothing to save
TAIL_LINES = 30
NO_ROOM_FOR_CACHE = "leave no GPU memory for the KV cache"  # SGLang's words, of a CPU's memory too


class StartedServer:
    """A server that this service starts."""

    restartable = True

    def __init__(
        self,
        section: EngineSection,
        model_path: str,
        log_path: Path,
        *,
        overlap: bool = True,
        gives_up_memory: bool = False,
        returns_experts: bool = False,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """`overlap`, `gives_up_memory`, `returns_experts`: see `arguments.command`. `environ`: what it inherits."""
        self.url = ""
        self._environ = environ
        self._overlap = overlap
        self._gives_up_memory = gives_up_memory
        self._returns_experts = returns_experts
        self._section = section
        self._model_path = model_path
        self._log_path = log_path
        self._device: str | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._identity: ProcessIdentity | None = None
        self._held_port: socket.socket | None = None
        self._folder: OwnFolder | None = None

    @property
    def pid(self) -> int:
        """The process id of the server's first process; 0 while there is none."""
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        await self.stop()
        python = find_python(self._section)
        if self._device is None:
            self._device = await self._probe(python)
        self._held_port = hold_port(self._section.port)
        port = self._held_port.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        try:
            self._folder = await asyncio.to_thread(OwnFolder, self._environ)
            self._process = await self._spawn(python, self._device, port, self._folder)
            self._identity = ProcessIdentity.of(self._process.pid)
            await self._wait_until_ready(self._process)
            await asyncio.to_thread(_record, self._process.pid, self._folder)
        except BaseException:
            await self.stop()
            raise

    async def _spawn(self, python: str, device: str, port: int, folder: OwnFolder) -> asyncio.subprocess.Process:
        arguments = command(
            self._section,
            python,
            device,
            self._model_path,
            port,
            overlap=self._overlap,
            gives_up_memory=self._gives_up_memory,
            returns_experts=self._returns_experts,
        )
        inherited = {**folder.variables(device), **self._environ, "TMPDIR": str(folder.path)}
        try:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            with self._log_path.open("ab") as log_file:
                return await asyncio.create_subprocess_exec(
                    *tied_command(arguments),
                    env=environment(self._section, device, self._model_path, port, inherited),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log_file,
                    stderr=log_file,
                    start_new_session=True,
                )
        except OSError as error:
            raise TransientStartError(
                f"SGLang cannot be started with its log in {self._log_path} ({error.strerror}); expected room there, "
                "and a host that can start processes"
            ) from error

    async def died(self) -> str:
        process = self._process
        if process is None:
            raise EngineDiedError("the engine is not started; expected `start` first")
        code = await process.wait()
        if process is not self._process:
            await asyncio.Event().wait()  # it was stopped on purpose
        return f"SGLang ended with code {code}; the end of {self._log_path}:\n{self._tail()}"

    async def stop(self) -> None:
        process, identity, folder = self._process, self._identity, self._folder
        self._process = self._identity = self._folder = None
        if self._held_port is not None:
            self._held_port.close()
            self._held_port = None
        await asyncio.shield(asyncio.to_thread(_end, identity, folder))
        if process is not None:
            await process.wait()

    async def _probe(self, python: str) -> str:
        """The device to use; EngineStartError if SGLang is not installed there."""
        device = self._section.device
        sees_cuda = await probe_python(python, device, PROBE_TIMEOUT_SECONDS)
        if device == "auto":
            return "cuda" if sees_cuda else "cpu"
        return device

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        ended = asyncio.ensure_future(process.wait())
        answering = asyncio.ensure_future(_until_it_answers(self.url))
        try:
            done, _ = await asyncio.wait(
                (ended, answering),
                timeout=self._section.start_timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for task in (ended, answering):
                task.cancel()
            await asyncio.gather(ended, answering, return_exceptions=True)
        if ended not in done and answering in done:
            return
        tail = f"the end of {self._log_path}:\n{self._tail()}"
        if ended in done:
            raise TransientStartError(f"SGLang ended with code {process.returncode}{_why(tail)}; {tail}")
        limit = self._section.start_timeout_seconds  # the user's, for one start: a further one would double it
        raise EngineStartError(f"SGLang did not answer within rollout.engine.start_timeout_seconds = {limit:g}; {tail}")

    def _tail(self) -> str:
        try:
            text = self._log_path.read_bytes()[-16384:].decode(errors="replace")
        except OSError as error:
            return f"(cannot be read: {error.strerror})"
        return "\n".join(text.splitlines()[-TAIL_LINES:])


def _why(log: str) -> str:
    """What SGLang's words mean, where they mislead."""
    if NO_ROOM_FOR_CACHE not in log:
        return ""
    return (
        ": while it loaded the model, that and other processes took more of the memory that was free before than "
        "rollout.engine.memory_fraction leaves them; end others, or raise that key"
    )


def _record(pid: int, folder: OwnFolder) -> None:
    folder.record(files_of(pid))


def _end(engine: ProcessIdentity | None, folder: OwnFolder | None) -> None:
    if engine is not None:
        kill_and_clear(engine, STOP_GRACE_SECONDS)
    if folder is not None:
        folder.remove()


def find_python(section: EngineSection) -> str:
    """The interpreter of the configuration; EngineStartError if there is none."""
    python = shutil.which(section.python)
    if python is None:
        where = f"; {looked_for(section.python)}" if os.sep in section.python else ""
        raise EngineStartError(
            f"rollout.engine.python: {section.python!r} is no executable; expected the Python interpreter of "
            f"an environment with SGLang (`penstock envs` makes one), or rollout.engine.url of a running server{where}"
        )
    return str(Path(python).absolute())


async def probe_python(python: str, device: str, timeout_seconds: float) -> bool:
    """Whether an interpreter with SGLang sees a GPU, asked only if device is auto: that imports torch.

    EngineStartError if it gives no answer in time, or has no SGLang.
    """
    process = await asyncio.create_subprocess_exec(
        *tied_command([python, "-c", PROBE, device]),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), timeout_seconds)
    except TimeoutError:
        await _killed(process)
        raise _does_not_work(python, f"no answer within {timeout_seconds:g} s") from None
    try:
        version, sees_cuda = json.loads(output.decode().splitlines()[-1])
    except (ValueError, IndexError):
        raise _does_not_work(python, errors.decode(errors="replace")[-500:]) from None
    require_sglang(python, version)
    return bool(sees_cuda)


async def _killed(process: asyncio.subprocess.Process) -> None:
    """End a process before its loop ends: a transport that outlives the loop complains."""
    with contextlib.suppress(ProcessLookupError, TimeoutError):
        process.kill()
        await asyncio.wait_for(process.wait(), KILL_SECONDS)


def _does_not_work(python: str, problem: str) -> EngineStartError:
    return EngineStartError(f"rollout.engine.python: {python} does not work as a Python interpreter: {problem}")


def require_sglang(python: str, version: str) -> None:
    """EngineStartError if the interpreter has no SGLang. version: SGLang's; empty: it is not installed."""
    if not version:
        raise EngineStartError(
            f"rollout.engine.python: {python} has no package `sglang`; expected an environment with SGLang "
            "(`penstock envs` makes one)"
        )


class GivenServer:
    """A server at `rollout.engine.url` that someone else started; this service never ends or restarts it."""

    restartable = False

    def __init__(self, section: EngineSection) -> None:
        self.url = section.url.rstrip("/")
        self._timeout_seconds = section.start_timeout_seconds

    async def start(self) -> None:
        try:
            await asyncio.wait_for(_until_it_answers(self.url), self._timeout_seconds)
        except TimeoutError:
            raise EngineStartError(
                f"rollout.engine.url: nothing answers like SGLang at {shown_url(self.url)} within "
                f"rollout.engine.start_timeout_seconds = {self._timeout_seconds:g}; expected a running server"
            ) from None

    async def died(self) -> str:
        await asyncio.Event().wait()  # only a request that fails shows its death
        raise AssertionError("unreachable")

    async def stop(self) -> None:
        return


def make_server(
    section: EngineSection,
    model_path: str,
    log_path: Path,
    pause_mode: PauseMode = "retract",
    *,
    gives_up_memory: bool = False,
    returns_experts: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> EngineServer:
    """The server of the configuration. `gives_up_memory`, `returns_experts`: see `arguments.command`. `environ`: what
    it inherits.

    Overlap is off with pause mode `in_place`: a paused server would have sampled one token without recording it, and
    would later report it with the next weights.
    """
    if section.url:
        return GivenServer(section)
    return StartedServer(
        section,
        model_path,
        log_path,
        overlap=pause_mode != "in_place",
        gives_up_memory=gives_up_memory,
        returns_experts=returns_experts,
        environ=environ,
    )


async def _until_it_answers(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=5.0, trust_env=False, verify=url.startswith("https")) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/model_info")).status_code == 200:
                    return
            await asyncio.sleep(READY_POLL_SECONDS)


def hold_port(port: int) -> socket.socket:
    """A socket that holds a port of 127.0.0.1: the system gives it to nobody else until the socket is closed.

    `port`: 0 for a free one. EngineStartError if it cannot be had: another server would answer in the engine's place.

    An engine listens half a minute after it was given its port. It can listen on a held port because both sockets set
    SO_REUSEADDR, and this one never listens.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind(("127.0.0.1", port))
    except OSError as error:
        held.close()
        kind = TransientStartError if error.errno == errno.EADDRINUSE else EngineStartError
        raise kind(
            f"rollout.engine.port: no engine can listen on 127.0.0.1:{port} ({error.strerror}); expected a free port "
            "of this host, or 0 for any"
        ) from None
    return held

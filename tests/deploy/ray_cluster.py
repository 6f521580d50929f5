"""A Ray cluster of several nodes on this host: each node is a `ray start --block` on a loopback address of its own.

Invariant: after `close`, no process that the cluster started is left.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from penstock.runtime.process import tied_command

JOB_SECONDS = 120
STORE_BYTES = 78643200  # the least that Ray accepts
RAY = Path(sys.executable).with_name("ray")


class RayNode:
    """One node of the cluster."""

    def __init__(self, host: str, log_path: Path, *words: str) -> None:
        self.host = host
        self._log_path = log_path
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        with log_path.open("wb") as output:
            self._process = subprocess.Popen(
                tied_command(
                    [
                        *(str(RAY), "start", "--block", "--disable-usage-stats", f"--node-ip-address={host}"),
                        *(f"--object-store-memory={STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0"),
                        *(f"--dashboard-agent-listen-port={free_port(host)}", "--num-gpus=0", *words),
                    ],
                    signal.SIGTERM,
                ),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def is_up(self) -> bool:
        assert self._process.poll() is None, self.log()
        return "Ray runtime started" in self.log()

    def processes(self) -> list[psutil.Process]:
        """All processes that the node has started."""
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def lose(self) -> None:
        """Fail like a host: kill -9 to all Ray processes of the node at once. What they ran must end by itself."""
        processes = self.processes()
        self._process.kill()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "raylet" in process.name() or "ray::" in " ".join(process.cmdline()):
                    process.kill()
        self._process.wait()

    def close(self) -> None:
        processes = self.processes()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


class RayCluster:
    """A head node, and further nodes that come and go."""

    def __init__(self, *head: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ray")  # paths of sockets must be short
        self.folder = Path(self._folder.name)
        host = "127.0.0.2"
        port, dashboard_port = free_port(host), free_port(host)
        self.address = f"{host}:{port}"
        self.jobs_url = f"http://{host}:{dashboard_port}"
        self.nodes: list[RayNode] = []
        self.head = self._start(
            host,
            *("--head", f"--port={port}", f"--temp-dir={self.folder}", *head),
            *("--include-dashboard=true", f"--dashboard-host={host}", f"--dashboard-port={dashboard_port}"),
        )

    def add(self, *words: str) -> RayNode:
        """Add a node."""
        return self._start(f"127.0.0.{len(self.nodes) + 2}", f"--address={self.address}", *words)

    def job(self, *words: str) -> str:
        """The output of `ray job`."""
        action, *rest = words
        command = [str(RAY), "job", action, "--address", self.jobs_url, *rest]
        done = subprocess.run(command, capture_output=True, text=True, timeout=JOB_SECONDS, check=False)
        return done.stdout + done.stderr

    def _start(self, host: str, *words: str) -> RayNode:
        node = RayNode(host, self.folder / f"{host}.log", *words)
        self.nodes.append(node)
        return node

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.close()
        self._folder.cleanup()


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])

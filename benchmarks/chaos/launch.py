"""A `penstock launch local` as a child, and the processes below it.

Owns finding victims. Invariant: a process is signalled only while it is a descendant of the launcher that this object
started; every descendant that was ever seen is ended by `end`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
END_SECONDS = 60.0
ENVIRONMENT_WORD = "penstock_agent.environments.child"
ENGINE_WORDS = ("chaos/engine.py", "penstock_rollout/engine/sglang/inside/launcher.py")
TAIL_BYTES = 1500


class Launch:
    """One run's launcher over all its lives."""

    def __init__(self, config: Path, run_folder: Path, environment: Mapping[str, str]) -> None:
        self.run_folder = run_folder
        self.output = config.with_name("launcher-output.log")
        self._command = [sys.executable, "-m", "penstock_launch", "launch", "local", "--config", str(config)]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **environment}
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[tuple[int, float], psutil.Process] = {}

    def start(self) -> None:
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def exit_code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    def kill(self) -> int:
        """Send SIGKILL to the launcher itself; returns its pid."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        return self._process.pid

    def below(self) -> list[psutil.Process]:
        """All processes that descend from the launcher now."""
        if self.exit_code() is not None:
            return []
        try:
            found = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._seen[(process.pid, process.create_time())] = process
        return found

    def victims(self, kind: str) -> dict[str, psutil.Process]:
        """Name -> process, for the running services of a kind. An engine has the name of its service; `environment`:
        the worker processes of agent services.
        """
        if kind == "environment":
            agents = [each for each in self.victims("agent").values() if each.is_running()]
            children = [child for agent in agents for child in _children(agent)]
            return {f"environment-{each.pid}": each for each in children if _is(kind, each)}
        running = {process.pid: process for process in self.below()}
        wanted = "rollout" if kind == "engine" else kind
        found: dict[str, psutil.Process] = {}
        for service, pid in self._recorded():
            if service.partition("-")[0] == wanted and pid in running and _is(kind, running[pid]):
                name = service.replace("rollout", "engine") if kind == "engine" else service
                found.setdefault(name, running[pid])
        return found

    def _recorded(self) -> list[tuple[str, int]]:
        """Name and pid of each service in the launcher's record."""
        try:
            known = json.loads((self.run_folder / "processes.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return []
        return [(each["service"], each["pid"]) for each in known["processes"]]

    def num_steps(self) -> int:
        """Steps reported so far."""
        try:
            return (self.run_folder / "steps.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def end(self) -> None:
        """Stop the launcher in order, then kill whatever is left of the processes ever seen."""
        self.below()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self.below()
                self._process.kill()
                self._process.wait()
        for process in self.left_over():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def left_over(self) -> list[psutil.Process]:
        """Processes of this run that still exist."""
        return [each for each in self._seen.values() if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def tail(self) -> str:
        """The ends of all logs."""
        logs = [self.output, *sorted(self.run_folder.glob("logs/*.log"))]
        return "\n".join(
            f"== {path}\n{path.read_bytes()[-TAIL_BYTES:].decode(errors='replace')}" for path in logs if path.exists()
        )


def listening_url(process: psutil.Process) -> str:
    """Of a service that listens on one port of this host; empty if it does not listen, or not yet."""
    try:
        ports = [each.laddr.port for each in process.net_connections("tcp4") if each.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return ""
    return f"http://127.0.0.1:{ports[0]}" if ports else ""


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children())
    except psutil.NoSuchProcess:
        return []


def _is(kind: str, process: psutil.Process) -> bool:
    """Whether a process of the right service is the one that `kind` means (its engine, or the service itself)."""
    try:
        line = " ".join(process.cmdline())
        if "lifeline.py" in line:  # not yet the command itself
            return False
        if kind == "environment":
            return ENVIRONMENT_WORD in line
        if kind == "queue":
            return "valkey-server" in line or "redis-server" in line
        return any(word in line for word in ENGINE_WORDS) if kind == "engine" else f"-m penstock_{kind}" in line
    except psutil.Error:
        return False

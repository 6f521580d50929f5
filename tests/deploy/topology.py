"""A clone of this repository, and the containers that `docker compose` makes from it."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

CALL_SECONDS = 60.0
BUILD_SECONDS = 3600
POLL_SECONDS = 1.0
ROOT = Path(__file__).parents[2]
PORTS = ("TRAINER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
RECORD = "runs/demo/steps.jsonl"  # of the demo, in the containers of trainer and rollout
# The process that init started is the service; its first child is the engine.
MAIN = "main=$(cut -d' ' -f1 /proc/1/task/1/children); "
ENGINE = MAIN + "engine=$(cut -d' ' -f1 /proc/$main/task/$main/children); "


def why_not() -> str:
    """Why no containers can be run here; empty if they can."""
    if shutil.which("docker") is None:
        return "no `docker` on PATH"
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        ran = subprocess.run(command, capture_output=True, text=True)
        if ran.returncode != 0:
            return f"`{' '.join(command)}` fails: {ran.stderr.strip()[-300:]}"
    return ""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def clone(folder: Path, **settings: str) -> None:
    """A fresh clone like a user's, with secrets, its own ports and these settings."""
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(folder)], check=True)
    subprocess.run(["make", "env"], cwd=folder, check=True, capture_output=True)
    ports = {name: str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
    indexes = {name: os.environ.get(name, "") for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL")}
    with (folder / ".env").open("a") as file:
        file.writelines(f"{name}={value}\n" for name, value in (ports | indexes | settings).items())


@dataclass(frozen=True)
class Container:
    """One container at one moment. Two lives of it differ in `started`."""

    id: str
    service: str
    state: str
    health: str
    exit_code: int
    started: str


class Topology:
    """One project of docker compose, seen through its command line and its published ports."""

    def __init__(self, folder: Path, project: str) -> None:
        self.folder = folder
        self.project = project

    def compose(self, *arguments: str, timeout_seconds: float = CALL_SECONDS, check: bool = True) -> str:
        """The output of the command; AssertionError with the output if it fails."""
        command = ["docker", "compose", "--project-name", self.project, *arguments]
        ran = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=timeout_seconds)
        if check and ran.returncode != 0:
            raise AssertionError(f"{' '.join(command)}: exit code {ran.returncode}\n{ran.stdout}\n{ran.stderr}")
        return ran.stdout

    def up(self, *arguments: str, timeout_seconds: float = 600) -> None:
        """Wait until every container is healthy."""
        self.compose("up", "--detach", "--wait", "--quiet-pull", *arguments, timeout_seconds=timeout_seconds)

    def containers(self, service: str = "") -> list[Container]:
        """The containers of a service, or of all services, including those that have ended."""
        ids = self.compose("ps", "--all", "--quiet", *([service] if service else [])).split()
        if not ids:
            return []
        listed = subprocess.run(["docker", "inspect", *ids], check=True, capture_output=True, text=True).stdout
        return [
            Container(
                id=each["Id"],
                service=each["Config"]["Labels"]["com.docker.compose.service"],
                state=each["State"]["Status"],
                health=each["State"].get("Health", {}).get("Status", ""),
                exit_code=each["State"]["ExitCode"],
                started=each["State"]["StartedAt"],
            )
            for each in json.loads(listed)
        ]

    def only(self, service: str) -> Container:
        """The only container of a service."""
        [container] = self.containers(service)
        return container

    def shell(self, service: str, script: str) -> str:
        """The output of `sh` in the container of a service."""
        return self.compose("exec", "-T", service, "sh", "-ec", script)

    def get(self, service: str, port: int, path: str, **headers: str) -> Any:
        """JSON from a published port; None if nothing answers, for example while a service restarts."""
        address = self.compose("port", service, str(port), check=False).strip()
        if not address:
            return None
        request = urllib.request.Request(f"http://{address}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def status(self) -> dict[str, Any]:
        """The trainer's status; empty while it starts."""
        return self.get("trainer", 8000, "/v1/status") or {}

    def step(self) -> int:
        """Trained steps; -1 while the trainer starts."""
        return int(self.status().get("step", -1))

    def trained_steps(self, record: str = RECORD) -> list[int]:
        """The steps in the run's own record, in its order."""
        text = self.shell("trainer", f"cat {record}")
        return [json.loads(line)["step"] for line in text.splitlines()]

    def logs(self) -> str:
        """The end of all logs, for a failure; without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.compose("logs", "--no-color", "--tail", "40", check=False))


def until(look: Callable[[], T], seconds: float, what: str, topology: Topology) -> T:
    """Poll until `look` returns a true value; returns it. AssertionError with the logs if that takes too long."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds:g} s not {what}: saw {seen!r}\n{topology.logs()}")
        time.sleep(POLL_SECONDS)
    return seen


@contextmanager
def running_topology(folder: Path, override: str, **settings: str) -> Iterator[Topology]:
    """A clone with `settings` in `.env` and `override` as its own file of compose, its images built; ended afterwards.

    Skips the test, with the reason, if no containers can be run here.
    """
    if reason := why_not():
        pytest.skip(f"docker compose is not tried: {reason}")
    clone(folder / "penstock", COMPOSE_FILE="docker-compose.yml:override.yaml", **settings)
    topology = Topology(folder / "penstock", f"penstock-test-{os.getpid()}")
    (topology.folder / "override.yaml").write_text(override)
    topology.compose("build", "--quiet", timeout_seconds=BUILD_SECONDS)
    try:
        yield topology
    finally:
        topology.compose("down", "--volumes", "--timeout", "10", timeout_seconds=120)


def healthy(topology: Topology, services: Collection[str]) -> list[Container]:
    """The containers of these services if every one works; else nothing."""
    found = [each for each in topology.containers() if each.service in services]
    complete = {each.service for each in found} == set(services)
    return found if complete and all(each.health == "healthy" for each in found) else []


def up_targets(topology: Topology) -> list[str]:
    """The job of each target that Prometheus reaches."""
    answer = topology.get("prometheus", 9090, "/api/v1/targets?state=active")
    targets = answer["data"]["activeTargets"] if answer else []
    return sorted(each["labels"]["job"] for each in targets if each["health"] == "up")


def life(topology: Topology, victim: str) -> str:
    """A value that differs between two lives of a process: the start of its container, or the pid of an engine."""
    if victim == "engine":
        return topology.shell("rollout", ENGINE + "echo $engine").strip()
    return topology.only(victim).started

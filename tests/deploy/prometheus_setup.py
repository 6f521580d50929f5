"""A small running system, and a real Prometheus that scrapes it with the repository's configuration.

The system is real except for the engine, which is the pure function of benchmarks.chaos. Prometheus differs from a
user's only in its targets and its scrape interval.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.chaos.launch import ROOT, Launch
from benchmarks.chaos.model import make_tiny_model, write_prompts
from benchmarks.chaos.parts import make_pure_engine

PROMETHEUS_FOLDER = ROOT / "deploy" / "prometheus"
RUN = "watched"
NUM_PROMPTS = 16
EPOCHS = 10_000  # more than it will ever train: the test ends it
START_SECONDS = 90.0  # mostly for imports
END_SECONDS = 10.0
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class System:
    """A run that continues until the test ends it, and its folder."""

    launch: Launch
    targets: Path


@contextlib.contextmanager
def running_system(folder: Path) -> Iterator[System]:
    """A running system, from its first step; it is stopped in order afterwards."""
    make_tiny_model(folder / "model")
    for name in ("train", "held_out"):
        write_prompts(folder / f"{name}.jsonl", NUM_PROMPTS, folder / "pace")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(folder)), encoding="utf-8")
    launch = Launch(config, folder / "runs" / RUN, {})
    launch.start()
    try:
        system = System(launch, folder / "runs" / f"{RUN}.targets.json")

        def has_begun() -> bool:
            assert launch.exit_code() is None, launch.tail()
            return launch.num_steps() >= 3 and len(read_targets(system)) == 3

        wait_until(has_begun, START_SECONDS, launch.tail)
        yield system
    finally:
        launch.end()


def _config(folder: Path) -> dict[str, Any]:
    engine = {"python": str(make_pure_engine(folder, 0.02)), "dtype": "float32", "max_total_tokens": 4096}
    return {
        "run": {"name": RUN, "root": str(folder / "runs")},
        "actor": {"path": str(folder / "model"), "group_size": 4, "dtype": "float32"},
        "kl_ctl": 0.01,
        # The engine does not compute the model.
        "weights": {"folder": str(folder / "weights"), "canary_tokens": 0},
        "total_train_epochs": EPOCHS,
        "sampling": {"max_new_tokens": 10},
        "data": {
            "batch_size": 4,
            "train": {"path": str(folder / "train.jsonl")},
            "eval": {"path": str(folder / "held_out.jsonl")},
        },
        "checkpoint": {"every_steps": 5},
        "rollout": {"engine": engine},
        "reward": {
            "functions": {"benchmarks.chaos.chaos_rewards:share_of_early_letters": 1.0},
            "modules_path": str(ROOT),
        },
    }


def read_targets(system: System) -> list[dict[str, Any]]:
    """The scrape targets that the trainer writes for Prometheus; empty before it has written any."""
    try:
        found: list[dict[str, Any]] = json.loads(system.targets.read_text())
    except FileNotFoundError:
        return []
    return found


class Prometheus:
    """A server and its HTTP API."""

    def __init__(self, url: str) -> None:
        self._url = url

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(
            f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10
        ) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        """The values of an instant query, without those that are not numbers."""
        found = [float(each["value"][1]) for each in self.get("query", query=expression)["result"]]
        return [value for value in found if math.isfinite(value)]


@contextlib.contextmanager
def running_prometheus(folder: Path, targets: Path) -> Iterator[Prometheus]:
    """Prometheus with deploy/prometheus/cluster.yml, looking at `targets` every second."""
    configuration = yaml.safe_load((PROMETHEUS_FOLDER / "cluster.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(PROMETHEUS_FOLDER / each) for each in configuration["rule_files"]]
    [job] = configuration["scrape_configs"]
    [discovery] = job["file_sd_configs"]
    pattern = Path(discovery["files"][0]).name
    discovery.update(files=[str(targets.parent / pattern)], refresh_interval="1s")
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(configuration), encoding="utf-8")
    address = f"127.0.0.1:{_free_port()}"
    storage = folder / "data"
    command = [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={storage}",
        f"--web.listen-address={address}",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "GOMAXPROCS": "1"})
    try:
        server = Prometheus(f"http://{address}")
        wait_until(server.is_ready, 30, log.read_text)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(END_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(holds: Callable[[], bool], seconds: float, explain: Callable[[], object]) -> None:
    """Poll until the condition holds, since other processes raise no event. AssertionError with the explanation after
    `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {explain()}"
        time.sleep(LOOK_SECONDS)

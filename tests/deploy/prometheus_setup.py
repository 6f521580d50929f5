"""A small running system, and a real Prometheus that scrapes it with the repository's configuration.

The system is real except for the engine, which is the pure function of benchmarks.chaos. Prometheus differs from a
user's only in its targets and its scrape interval.
"""

import contextlib
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import start_http_server

from benchmarks.chaos.launch import ROOT, Launch
from benchmarks.chaos.model import make_tiny_model, write_prompts
from benchmarks.chaos.parts import make_pure_engine
from penstock.contracts import PolicyIdentity, Score, ServiceKind, VersionSpan, pack_float32, pack_int32
from penstock.contracts.trajectories import Episode, EpisodeCounts, Node
from penstock_agent.metrics import AgentMetrics
from penstock_rollout.metrics import RolloutMetrics
from penstock_trainer.telemetry.episode_metrics import FIGURES as EPISODE_FIGURES
from penstock_trainer.telemetry.metrics import TrainerMetrics
from penstock_trainer.telemetry.records import StepLine

PROMETHEUS_FOLDER = ROOT / "deploy" / "prometheus"
RUN, EPISODES = "watched", "episodes"  # what runs, and what only has metrics, of a run in trouble
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
        "teacher": {"path": str(folder / "model"), "kl_ctl": 0.01},
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


@contextlib.contextmanager
def serving_episodes(folder: Path) -> Iterator[None]:
    """A run of episodes without processes: only the metrics of its services, in which everything happens twice a second
    that a healthy run does not have: failed attempts, steps that are not finite, dead letters, restarted engines.
    """
    agent, trainer, rollout = AgentMetrics(), TrainerMetrics(of_episodes=True), RolloutMetrics()
    agent.watch(running=lambda: 2, waiting=lambda: 0)
    trainer.queue.show_services(dict.fromkeys(ServiceKind, 1), {})
    ended = threading.Event()

    def happen() -> None:
        figures = dict.fromkeys(EPISODE_FIGURES, 1.0)
        for number in itertools.count(1):
            if ended.wait(LOOK_SECONDS):
                return
            _let_an_episode_end(agent)
            line = StepLine(number, 1, 0.0, (0,), 0.0, time.time(), {}, 0.5, 10, 0.5, 0, 0.0, figures)
            trainer.observe_step(line, [], outcome="non_finite")
            trainer.queue.show_streams({"dead": number}, {})
            rollout.engine_restarted()

    servers = {
        job: start_http_server(0, addr="127.0.0.1", registry=registry)
        for job, registry in (
            ("agent", agent.registry),
            ("trainer", trainer.registry),
            ("rollout", rollout.registry),
        )
    }
    worker = threading.Thread(target=happen)
    worker.start()
    entries = [
        {"targets": [f"127.0.0.1:{server.server_port}"], "labels": {"job": job, "run": EPISODES}}
        for job, (server, _) in servers.items()
    ]
    try:
        (folder / f"{EPISODES}.targets.json").write_text(json.dumps(entries), encoding="utf-8")
        yield
    finally:
        ended.set()
        worker.join()
        for server, thread in servers.values():
            server.shutdown()
            server.server_close()
            thread.join()


def _let_an_episode_end(metrics: AgentMetrics) -> None:
    """One that had everything that is counted, after an attempt that failed."""
    policy = PolicyIdentity(1, "9f86d081884c7d65")
    nodes = (
        Node(-1, pack_int32([1, 2])),
        Node(0, pack_int32([3]), pack_float32([-0.5]), (VersionSpan(policy, 0, 1),), "assistant"),
    )
    counts = EpisodeCounts(3, 2, 1, branches={"edited": 1}, num_prompt_tokens=90, num_cached_tokens=60)
    metrics.attempt_ended("failure", has_score=False, seconds=1.0, model_seconds=0.5)
    metrics.attempt_ended("done", has_score=True, seconds=1.0, model_seconds=0.5)
    metrics.episode_ended(Episode(nodes, Score(1.0), "done", counts, 0.0, 1.0))
    metrics.group_ended("published", num_kept=1)
    metrics.call_answered(0.5, 0.001)
    metrics.call_repeated()
    metrics.request_refused("context_length_exceeded")
    metrics.asked_again("busy")


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
    """Prometheus with deploy/prometheus/prometheus.yml, looking at `targets` every second."""
    configuration = yaml.safe_load((PROMETHEUS_FOLDER / "prometheus.yml").read_text())
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

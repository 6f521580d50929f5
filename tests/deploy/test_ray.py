"""`penstock launch ray` on a real Ray cluster of several nodes, with real services over the pure-function engine.

The nodes are on this host, each on a loopback address of its own. So a service that listens on or registers a wrong
address cannot be reached from the other node.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import redis
import yaml

from benchmarks.chaos.model import make_tiny_model, write_prompts
from benchmarks.chaos.parts import BATCH_SIZE, NOTHING, NUM_PROMPTS, ChaosPart, part_config
from benchmarks.chaos.reader import Findings, RunReader
from penstock.broker.embedded import EmbeddedServer
from penstock.contracts import ServiceKind
from tests.deploy.letters import AGENT
from tests.deploy.ray_cluster import RayCluster, RayNode
from tests.gsm8k_run import RUN_SECONDS, require_two_steps, write_small_run
from tests.patience import START_SECONDS

pytest.importorskip("ray", reason="Ray is not installed: `make test-deploy` installs it")

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.timeout(600)]

PART = ChaosPart("ray", NOTHING, num_steps=8, max_staleness=1, deadline_seconds=0, num_servers=2)
SLOW_SECONDS = 1.0  # for each completion: the run cannot end before it is told to
SMALL = {"num_cpus": 0.3}  # the services of a run fit on any one node


class RayRun:
    """A run on a cluster, from outside."""

    def __init__(self, folder: Path, ray: Mapping[str, object]) -> None:
        self.folder = folder / "runs" / "chaos"
        self._pace = folder / "pace"
        self._started: list[subprocess.Popen[str]] = []
        make_tiny_model(folder / "model")
        write_prompts(folder / "train.jsonl", NUM_PROMPTS, self._pace)
        document = part_config(PART, folder)
        document["weights"] = {"canary_tokens": 0}
        document["ray"] = {"rollout": SMALL, "reward": SMALL, "trainer": SMALL, **ray}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(document))

    def set_pace(self, seconds: float) -> None:
        self._pace.write_text(str(seconds))

    def command(self, *overrides: str) -> list[str]:
        words = ["launch", "ray", "--config", str(self.config), *overrides]
        return [sys.executable, "-m", "penstock_launch", *words]

    def launch(self, *overrides: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            self.command(*overrides),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def penstock(self, word: str) -> str:
        """The output of the command about the run."""
        command = [sys.executable, "-m", "penstock_launch", word, "--config", str(self.config)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        return said.stdout + said.stderr

    def events(self) -> str:
        log = self.folder / "logs" / "launcher.log"
        return log.read_text() if log.exists() else ""

    def wait_for(self, text: str, count: int = 1) -> None:
        until(lambda: self.events().count(text) >= count, lambda: f"no {text!r} in\n{self.events()}")

    def wait_for_step(self) -> None:
        """Wait until a step is trained. If several end between two looks, the launcher shows only the last."""
        until((self.folder / "steps.jsonl").exists, self.events)

    def processes(self, kind: str, *words: str) -> list[psutil.Process]:
        """The services of this run of one kind, with these words in their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            mine = str(self.folder / "config.yaml") in line and f"penstock_{kind}" in line
            if mine and "-S" not in line and all(word in line for word in words):  # -S: not yet the service itself
                found.append(process)
        return found

    def one(self, kind: str, *words: str) -> psutil.Process:
        until(lambda: len(self.processes(kind, *words)) == 1, lambda: f"{self.processes(kind)}\n{self.events()}")
        return self.processes(kind, *words)[0]

    def all_services(self) -> list[psutil.Process]:
        return [each for kind in ServiceKind for each in self.processes(kind)]

    def findings(self) -> Findings:
        """The findings of the independent reader, in the folder and in the queue's data."""
        with (
            EmbeddedServer(self.folder / "queue") as server,
            redis.Redis(port=server.port, password=server.password) as client,
        ):
            reader = RunReader(client, "chaos", self.folder)
            return reader.read(num_tickets=PART.num_tickets, batch_size=BATCH_SIZE, max_staleness=PART.max_staleness)

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()


def until(condition: Callable[[], object], explain: Callable[[], str], timeout_seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head with two CPUs."""
    cluster = RayCluster("--num-cpus=2")
    try:
        until(lambda: cluster.head.is_up, cluster.head.log)
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def add_node(cluster: RayCluster) -> Iterator[Callable[..., RayNode]]:
    """Adds a node to the cluster, for this test alone."""
    nodes: list[RayNode] = []

    def add(*words: str) -> RayNode:
        node = cluster.add(*words)
        nodes.append(node)
        until(lambda: node.is_up, node.log)
        return node

    yield add
    for node in nodes:
        node.close()


@pytest.fixture
def start_run(tmp_path: Path, cluster: RayCluster) -> Iterator[Callable[..., RayRun]]:
    runs: list[RayRun] = []

    def start(**ray: object) -> RayRun:
        runs.append(RayRun(tmp_path, {"address": cluster.address, **ray}))
        return runs[0]

    yield start
    for run in runs:
        run.close()


def test_a_run_on_two_nodes_outlives_a_process_a_worker_and_a_node(
    cluster: RayCluster, add_node: Callable[..., RayNode], start_run: Callable[..., RayRun]
) -> None:
    node = add_node("--num-cpus=2")
    run = start_run()
    run.set_pace(SLOW_SECONDS)
    launcher = run.launch()
    run.wait_for_step()
    away = run.one("rollout", "--rollout.host", node.host)
    here = run.one("rollout", "--rollout.host", cluster.head.host)

    actor = here.parent()
    here.kill()
    run.wait_for("died (killed by SIGKILL)")
    replaced = run.one("rollout", "--rollout.host", cluster.head.host)
    assert replaced.pid != here.pid
    assert replaced.parent() == actor, "expected the same actor to start it again in its place"

    assert actor is not None
    actor.kill()
    run.wait_for("died (its actor is lost")
    until(lambda: not replaced.is_running(), lambda: "the process outlives its actor")
    run.one("rollout", "--rollout.host", cluster.head.host)

    node.lose()
    until(lambda: not away.is_running(), lambda: "the process outlives its node")
    until(lambda: len(run.processes("rollout", cluster.head.host)) == 2, run.events)
    run.set_pace(0)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    assert "Finished: 8 steps" in output
    found = run.findings()
    assert not found.problems
    assert found.trained == PART.num_tickets
    assert not run.all_services()


def test_agent_services_are_actors_that_outlive_their_node(
    cluster: RayCluster, add_node: Callable[..., RayNode], start_run: Callable[..., RayRun]
) -> None:
    node = add_node("--num-cpus=1", '--resources={"tools": 2}')
    spare = add_node("--num-cpus=1", '--resources={"tools": 2}')
    others = {**SMALL, "resources": {f"node:{cluster.head.host}": 0.01}}  # so that the agents' nodes have room for them
    run = start_run(agent={**SMALL, "resources": {"tools": 1}}, rollout=others, reward=others, trainer=others)
    run.set_pace(SLOW_SECONDS)
    words = [word for key, value in AGENT.items() for word in (f"--agent.{key}", str(value))]
    launcher = run.launch(*words, "--rollout.num_servers", "1", "--reward.num_services", "1")
    run.wait_for_step()
    agents = run.processes("agent")
    assert len(agents) == 2
    hosts = {host for host in (node.host, spare.host) if run.processes("agent", "--agent.host", host)}
    assert not run.processes("agent", "--agent.host", cluster.head.host)  # it has no tools
    lost = node if node.host in hosts else spare
    lost.lose()
    other = spare if lost is node else node
    until(lambda: len(run.processes("agent", "--agent.host", other.host)) == 2, run.events)
    run.set_pace(0)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    assert "Finished: 8 steps" in output
    assert "2.0 turns" in output
    assert not run.all_services()


def test_each_process_sees_the_gpus_that_it_uses_and_no_others(
    add_node: Callable[..., RayNode], start_run: Callable[..., RayRun]
) -> None:
    """GPUs of which only Ray knows: it numbers them, and shows each process its own."""
    add_node("--num-cpus=2", "--num-gpus=5")
    run = start_run()
    run.set_pace(SLOW_SECONDS)  # so that the run does not end meanwhile
    words = ("--rollout.engine.device", "auto", "--rollout.engine.tensor_parallel_size", "2")
    launcher = run.launch(*words, "--reward.num_services", "1")
    until(lambda: len(run.processes("rollout")) == 2, run.events)
    services = [*run.processes("rollout"), run.one("trainer")]
    seen = [each.environ()["CUDA_VISIBLE_DEVICES"].split(",") for each in services]
    assert [len(each) for each in seen] == [2, 2, 1]
    assert len({gpu for each in seen for gpu in each}) == 5
    assert run.one("reward").environ()["CUDA_VISIBLE_DEVICES"] == ""
    assert "MALLOC_MMAP_MAX_" not in run.one("trainer").environ()
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGTERM, output


def test_ranks_on_two_nodes_end_and_start_together(
    cluster: RayCluster, add_node: Callable[..., RayNode], start_run: Callable[..., RayRun]
) -> None:
    node = add_node("--num-cpus=2")
    run = start_run(trainer={**SMALL, "strategy": "STRICT_SPREAD"})
    run.set_pace(SLOW_SECONDS)
    words = ("--trainer.num_ranks", "2", "--rollout.num_servers", "1", "--reward.num_services", "1")
    launcher = run.launch(*words)
    run.wait_for_step()
    leader = run.one("trainer", "--trainer.host", cluster.head.host)
    follower = run.one("trainer", "--trainer.host", node.host)
    ranks = {each.environ()["RANK"]: each for each in (leader, follower)}
    assert ranks.keys() == {"0", "1"}

    ranks["1"].kill()
    run.wait_for("trainer: died (rank 1 of 2: killed by SIGKILL)")
    until(lambda: not ranks["0"].is_running(), lambda: "rank 0 goes on alone")
    run.wait_for("trainer: ready after", count=2)

    services = run.all_services()
    assert len(services) == 4
    launcher.kill()
    until(lambda: not any(map(alive, services)), lambda: f"they outlive the launcher: {services}")

    again = run.launch(*words)
    run.wait_for("trainer: ready after", count=3)
    services = run.all_services()
    cancelled = run.penstock("cancel")
    output, _ = again.communicate(timeout=90)
    assert "has ended" in cancelled
    assert again.returncode == 128 + signal.SIGTERM, output
    assert "killed" not in output
    assert not any(map(alive, services))
    assert [path.name for path in run.folder.glob("logs/trainer*")] != ["trainer.log"]


def test_a_submitted_job_stops_in_order(cluster: RayCluster, start_run: Callable[..., RayRun]) -> None:
    run = start_run(address="auto")
    run.set_pace(SLOW_SECONDS)
    patient = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}})
    words = ("--rollout.num_servers", "1", "--reward.num_services", "1")
    cluster.job(
        *("submit", "--submission-id", "run", "--no-wait", "--runtime-env-json", patient, "--", *run.command(*words))
    )
    run.wait_for_step()
    services = run.all_services()
    assert "trainer-1: ready" in run.penstock("status")
    said = cluster.job("stop", "run")
    until(lambda: (run.folder / "summary.json").exists(), lambda: f"{said}\n{cluster.job('logs', 'run')}")
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["exit"] == {"code": 128 + signal.SIGTERM, "reason": "stopped by SIGTERM", "lines": []}
    assert "killed" not in run.events()
    assert any((run.folder / "checkpoints").iterdir()), "the trainer could not write its checkpoint"
    until(lambda: not any(map(alive, services)), lambda: f"left: {services}")


def test_what_the_cluster_cannot_hold_ends_the_launch_with_the_keys(start_run: Callable[..., RayRun]) -> None:
    run = start_run(place_seconds=20, trainer={"num_cpus": 99})
    launcher = run.launch()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 2, output
    assert "trainer: no place within 20 s (ray.place_seconds): expected 99 CPU (1 such bundles, PACK)" in output
    assert "Traceback" not in output


def test_an_address_where_nothing_answers_is_named(start_run: Callable[..., RayRun]) -> None:
    run = start_run(address="127.0.0.2:1")
    launcher = run.launch()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 2, output
    assert "ray.address: nothing answers at 127.0.0.2:1" in output


@pytest.mark.timeout(2 * RUN_SECONDS)
def test_two_steps_of_gsm8k_are_trained_with_sglang(
    cluster: RayCluster, tmp_path: Path, start_run: Callable[..., RayRun]
) -> None:
    run = start_run()
    places = {"address": cluster.address, "rollout": SMALL, "reward": SMALL, "trainer": SMALL}
    run.config = write_small_run(tmp_path, "chaos", ray=places)
    launcher = run.launch()
    output, _ = launcher.communicate(timeout=RUN_SECONDS)
    assert launcher.returncode == 0, output
    require_two_steps(run.folder)
    assert not run.all_services()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE

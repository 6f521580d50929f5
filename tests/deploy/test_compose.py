"""docker compose, from a fresh clone: it starts, trains, is scraped, survives kills, and continues after `down`.

Needs a container engine and `docker compose`, builds the images, and trains the demo's model: `make test-deploy`. The
tests build on each other and run in this order. Without a container engine they are skipped with the reason.
"""

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from tests.deploy.topology import (
    ENGINE,
    MAIN,
    RECORD,
    Topology,
    healthy,
    life,
    running_topology,
    until,
    up_targets,
)

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(1800)]

SERVICES = ("valkey", "rollout", "reward", "trainer", "prometheus", "grafana")
# A run that does not end before the tests do, with a checkpoint now and then.
LONG_RUN = """
services:
  trainer: {environment: {PENSTOCK_TOTAL_TRAIN_EPOCHS: "1000", PENSTOCK_CHECKPOINT__EVERY_STEPS: "20"}}
"""
VICTIMS = ("valkey", "rollout", "engine", "reward", "trainer")


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    with running_topology(tmp_path_factory.mktemp("compose"), LONG_RUN) as topology:
        yield topology


def test_it_comes_up_and_trains(topology: Topology) -> None:
    topology.up()
    assert healthy(topology, SERVICES)
    assert topology.only("model").exit_code == 0
    until(lambda: topology.step() >= 10, 300, "at step 10", topology)


def test_containers_are_not_root_and_write_only_into_volumes(topology: Topology) -> None:
    for service in SERVICES:
        assert topology.shell(service, "id -u").strip() != "0"
        assert topology.shell(service, "touch /here 2>/dev/null || echo refused").strip() == "refused"
    published = {
        topology.compose("port", service, port).rpartition(":")[0].strip()
        for service, port in (("trainer", "8000"), ("prometheus", "9090"), ("grafana", "3000"))
    }
    assert published == {"127.0.0.1"}
    assert "torch" not in topology.shell("reward", "ls /opt/penstock/lib/python3*/site-packages").split()


def test_prometheus_scrapes_every_service(topology: Topology) -> None:
    jobs = ["reward", "rollout", "trainer"]
    until(lambda: up_targets(topology) == jobs, 60, "all targets up", topology)
    answer = topology.get("prometheus", 9090, "/api/v1/query?query=sum(penstock_trainer_steps_total)")
    assert float(answer["data"]["result"][0]["value"][1]) >= 1


def test_grafana_answers_and_is_provisioned(topology: Topology) -> None:
    assert topology.get("grafana", 3000, "/api/health") is not None
    provisioned = topology.shell(
        "grafana", "ls /etc/grafana/provisioning/datasources /etc/grafana/provisioning/dashboards"
    )
    assert {"prometheus.yml", "penstock.yml"} <= set(provisioned.split())


def test_reward_services_are_added_and_found(topology: Topology) -> None:
    topology.up("--no-recreate", "--scale", "reward=3")
    assert len(topology.containers("reward")) == 3
    until(lambda: up_targets(topology).count("reward") == 3, 60, "three reward targets up", topology)
    topology.up("--no-recreate", "--scale", "reward=1")


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_killed_process_is_survived(topology: Topology, victim: str) -> None:
    before, step, rollout = life(topology, victim), topology.step(), topology.only("rollout")
    if victim == "engine":
        topology.shell("rollout", ENGINE + "kill -9 $engine")
    else:
        topology.shell(victim, MAIN + "kill -9 $main")
    until(lambda: life(topology, victim) not in (before, ""), 120, f"{victim} started again", topology)
    until(lambda: healthy(topology, SERVICES), 300, "all healthy again", topology)
    until(lambda: topology.step() >= step + 3, 180, "three steps further", topology)
    steps = topology.trained_steps()
    assert steps == list(range(len(steps)))  # each once, none left out
    if victim == "engine":
        assert topology.only("rollout").started == rollout.started  # the service started it, and lived on


def test_down_and_up_goes_on_at_the_same_step(topology: Topology) -> None:
    topology.compose("down", timeout_seconds=240)
    assert topology.containers() == []
    record = topology.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "cat", "trainer", RECORD)
    num_steps = len(record.splitlines())
    topology.up()
    assert topology.step() >= num_steps
    until(lambda: topology.step() >= num_steps + 3, 180, "three steps further", topology)
    assert topology.shell("trainer", f"cat {RECORD}").startswith(record)  # nothing before was trained again
    steps = topology.trained_steps()
    assert steps == list(range(len(steps)))


def test_a_finished_trainer_is_not_started_again(topology: Topology) -> None:
    address = topology.compose("port", "trainer", "8000").strip()
    request = urllib.request.Request(f"http://{address}/v1/stop", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)
    settings = dict(line.split("=", 1) for line in (topology.folder / ".env").read_text().splitlines() if "=" in line)
    request.add_header("Authorization", f"Bearer {settings['PENSTOCK_TOKEN']}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 202
    until(lambda: topology.only("trainer").state == "exited", 180, "ended", topology)
    assert topology.only("trainer").exit_code == 0
    assert {each.service for each in topology.containers() if each.state == "running"} == set(SERVICES) - {"trainer"}

"""docker compose with the profile `agent`: a run of episodes trains, is scraped, and survives what kills its agents.

Needs what `test_compose` needs, and builds on its images. The tests build on each other and run in this order.
"""

from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.deploy.topology import MAIN, Topology, healthy, life, running_topology, until, up_targets

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(1800)]

SERVICES = ("valkey", "rollout", "agent", "reward", "trainer", "prometheus", "grafana")
RECORD = "runs/calculator/steps.jsonl"
# A run that does not end before the tests do.
LONG_RUN = """
services:
  trainer: {environment: {PENSTOCK_RUN__MAX_STEPS: "1000", PENSTOCK_TOTAL_TRAIN_EPOCHS: "1000"}}
"""


@pytest.fixture(scope="module")
def topology(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Topology]:
    settings = {"CONFIG": "examples/calculator/config.yaml", "COMPOSE_PROFILES": "demo,agent"}
    with running_topology(tmp_path_factory.mktemp("compose"), LONG_RUN, **settings) as topology:
        yield topology


def test_it_comes_up_and_trains(topology: Topology) -> None:
    topology.up()
    assert healthy(topology, SERVICES)
    until(lambda: topology.step() >= 2, 300, "at step 2", topology)


def test_the_container_of_environments_is_confined(topology: Topology) -> None:
    assert topology.shell("agent", "id -u").strip() == "10001"
    assert topology.shell("agent", "touch /here 2>/dev/null || echo refused").strip() == "refused"
    assert topology.compose("port", "agent", "8000", check=False).strip() in ("", ":0")
    assert "torch" not in topology.shell("agent", "ls /opt/penstock/lib/python3*/site-packages").split()


def test_prometheus_scrapes_the_agent_service(topology: Topology) -> None:
    def num_done() -> float:
        query = 'sum(penstock_agent_episodes_total{end="done"})'
        found = topology.get("prometheus", 9090, f"/api/v1/query?query={quote(query)}")["data"]["result"]
        return float(found[0]["value"][1]) if found else 0.0

    until(lambda: num_done() >= 2 * 6 * 8, 60, "the episodes of two steps", topology)


def test_agent_services_are_added_and_scraped(topology: Topology) -> None:
    topology.up("--no-recreate", "--scale", "agent=2")
    until(lambda: up_targets(topology).count("agent") == 2, 60, "two agent targets up", topology)
    topology.up("--no-recreate", "--scale", "agent=1")


def test_a_killed_agent_service_is_survived(topology: Topology) -> None:
    before, step = life(topology, "agent"), topology.step()
    topology.shell("agent", MAIN + "kill -9 $main")
    until(lambda: life(topology, "agent") not in (before, ""), 120, "agent started again", topology)
    until(lambda: topology.step() >= step + 3, 300, "three steps further", topology)
    assert healthy(topology, SERVICES)
    steps = topology.trained_steps(RECORD)
    assert steps == list(range(len(steps)))  # each once, none left out

"""A real Prometheus scrapes a running system: it finds all services, and every panel, rule and alert has data."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.prometheus_setup import (
    EPISODES,
    PROMETHEUS_FOLDER,
    RUN,
    Prometheus,
    System,
    read_targets,
    running_prometheus,
    running_system,
    serving_episodes,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
DASHBOARDS = PROMETHEUS_FOLDER.parent / "grafana" / "dashboards"
METRIC = re.compile(r"(?<![\w:])(?:run:penstock\w+:\w+|penstock_\w+|up)\b")
DATA_SECONDS = 60.0  # for the first checkpoint, evaluation and scrapes, on a busy machine


def need(tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on PATH; `apt-get install prometheus` brings it on Debian and Ubuntu")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    need("prometheus")
    with running_system(tmp_path_factory.mktemp("system")) as system, serving_episodes(system.targets.parent):
        yield system


@pytest.fixture(scope="module")
def prometheus(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), system.targets) as server:
        wait_until(lambda: len(server.values("up == 1")) == 5, 30, lambda: server.get("targets", state="active"))
        yield server


def panels() -> list[tuple[str, str]]:
    """Dashboard, title and query of every panel, with the variables as a user would choose them."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        run = EPISODES if path.stem == "agent" else RUN
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$run", run).replace("$window", "1m")
                assert "$" not in expression
                found.append((f"{path.stem}: {panel['title']}: {target['legendFormat']}", expression))
    return found


def ask_all(server: Prometheus, queries: list[tuple[str, str]]) -> None:
    """Wait until every query returns a number, for up to DATA_SECONDS."""
    missing = list(queries)

    def found() -> bool:
        missing[:] = [(name, expression) for name, expression in missing if not server.values(expression)]
        return not missing

    wait_until(found, DATA_SECONDS, lambda: "no data for\n" + "\n".join(f"{name}: {query}" for name, query in missing))


@pytest.mark.parametrize("file", ["cluster.yml", "rules/recording.yml", "rules/alerts.yml"])
def test_promtool_accepts_the_configuration_and_the_rules(file: str) -> None:
    need("promtool")
    kind = "rules" if file.startswith("rules/") else "config"
    ran = subprocess.run(["promtool", "check", kind, PROMETHEUS_FOLDER / file], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("path", sorted((PROMETHEUS_FOLDER / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_the_unit_tests_of_the_rules_pass(path: Path) -> None:
    need("promtool")
    ran = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_prometheus_finds_each_service_and_knows_its_run(prometheus: Prometheus) -> None:
    for job in ("trainer", "rollout", "reward"):
        assert prometheus.values(f'up{{job="{job}", run="{RUN}"}}') == [1.0]
    assert prometheus.values(f'penstock_services{{kind="agent", run="{RUN}"}}') == []  # it makes no episodes


def test_every_panel_shows_data(prometheus: Prometheus) -> None:
    queries = panels()
    assert len(queries) > 50
    ask_all(prometheus, queries)


def test_every_recording_rule_records(prometheus: Prometheus) -> None:
    groups = yaml.safe_load((PROMETHEUS_FOLDER / "rules" / "recording.yml").read_text())["groups"]
    names = [rule["record"] for group in groups for rule in group["rules"]]
    runs = {name: EPISODES if "_agent_" in name else RUN for name in names}
    ask_all(prometheus, [(name, f'{name}{{run="{run}"}}') for name, run in runs.items()])


def test_every_alert_has_what_it_looks_at_and_a_healthy_run_fires_none(prometheus: Prometheus) -> None:
    loaded = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {(rule["name"], rule["health"], rule.get("lastError", "")) for rule in loaded} == {
        (rule["name"], "ok", "") for rule in loaded
    }
    alerts = [rule for rule in loaded if rule["type"] == "alerting"]
    assert len(alerts) == 17
    looked_at = {(name, name) for rule in alerts for name in METRIC.findall(rule["query"])}
    ask_all(prometheus, sorted(looked_at))
    assert [rule["name"] for rule in alerts if rule["state"] == "firing"] == []


def test_the_figures_are_those_of_the_run(prometheus: Prometheus, system: System) -> None:
    [steps] = prometheus.values(f'penstock_trainer_run_steps{{run="{RUN}"}}')
    assert 3 <= steps <= system.launch.num_steps()
    [gap] = prometheus.values("run:penstock_gap_to_ideal:ratio15m")
    assert -0.5 < gap < 20  # a tiny model's steps are mostly overhead
    [used] = prometheus.values("run:penstock_queue_memory:ratio")
    assert 0 < used < 1
    assert prometheus.values("sum(penstock_rollout_servers)") == [1.0]
    assert prometheus.values(f'penstock_rollout_servers{{state="fenced", run="{RUN}"}}') == [0.0]


def test_a_run_that_ends_in_order_leaves_no_targets(prometheus: Prometheus, system: System) -> None:
    assert len(read_targets(system)) == 3
    system.launch.end()
    assert not system.targets.exists()
    wait_until(
        lambda: not prometheus.values(f'up{{run="{RUN}"}}'), 30, lambda: prometheus.get("targets", state="active")
    )

"""A real Prometheus scrapes a running system: it finds all services, and every panel, rule and alert has data."""

import json
import re
import shutil
import subprocess
import time
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
TROUBLES = ("Firing alerts", "Steps that were not finite", "Restarts of engines")
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
        wait_until(lambda: len(server.values("up == 1")) == 6, 30, lambda: server.get("targets", state="active"))
        yield server


def queries() -> Iterator[tuple[str, str, str]]:
    """Dashboard, title and query of every panel and every mark on the curves."""
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            for target in panel.get("targets", []):  # a heading has none
                yield path.stem, f"{panel['title']}: {target['legendFormat']}", target["expr"]
        if path.stem == "overview":  # the others mark the same
            for event in board["annotations"]["list"]:
                yield path.stem, event["name"], event["expr"]


def filled_in(expression: str, run: str) -> str:
    """With the variables as a user would choose them."""
    values = {"$run": run, "$window": "1m", "$__rate_interval": "20s"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression.replace('"$1"', "")  # of label_replace
    return expression


def run_of(board: str, title: str) -> str:
    """The run that has such data: what a healthy run of completions never has is that of the other one."""
    return EPISODES if board == "agent" or title.startswith(TROUBLES) else RUN


def ask_all(server: Prometheus, queries: list[tuple[str, str]]) -> None:
    """Wait until every query returns a number, for up to DATA_SECONDS."""
    missing = list(queries)

    def found() -> bool:
        missing[:] = [(name, expression) for name, expression in missing if not server.values(expression)]
        return not missing

    wait_until(found, DATA_SECONDS, lambda: "no data for\n" + "\n".join(f"{name}: {query}" for name, query in missing))


@pytest.mark.parametrize("file", ["prometheus.yml", "rules/recording.yml", "rules/alerts.yml"])
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


def test_the_overview_counts_services_that_are_gone_or_had_to_start_again(tmp_path: Path) -> None:
    need("promtool")
    lives = {  # by kind and address: the trainer goes on, an agent is gone, the others were restarted
        'job="trainer", instance="h:1"': "100x20",
        'job="agent", instance="h:2"': "100x5 stale",
        'job="reward", instance="h:3"': "100x9 700x10",
        'job="rollout", instance="h:4"': "100x5 stale",
        'job="rollout", instance="h:5"': "_x9 600x10",
    }
    series = {f'process_start_time_seconds{{run="{RUN}", {labels}}}': values for labels, values in lives.items()}
    series |= {f'up{{run="{RUN}", job="{job}", instance="h:1"}}': "1x20" for job in ("trainer", "reward")}
    series |= {f'up{{run="{RUN}", job="{job}", instance="h:9"}}': "0x20" for job in ("reward", "rollout")}
    series |= {f'penstock_services{{run="{RUN}", kind="{kind}"}}': "0x20" for kind in ("reward", "agent")}
    expected = {
        "Ended or restarted": {"trainer": 0, "agent": 1, "reward": 1, "rollout": 1},
        "Services that answer": {"trainer": 1, "agent": 0, "reward": 1, "rollout": 0},
    }
    cases = [
        {
            "expr": filled_in(expression, RUN),
            "eval_time": "20m",
            "exp_samples": [
                {"labels": f'{{job="{job}"}}', "value": value}
                for job, value in expected[title.partition(":")[0]].items()
            ],
        }
        for _, title, expression in queries()
        if title.partition(":")[0] in expected
    ]
    assert len(cases) == len(expected)
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": cases}]}))
    ran = subprocess.run(["promtool", "test", "rules", path], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_prometheus_finds_each_service_and_knows_its_run(prometheus: Prometheus) -> None:
    for job in ("trainer", "rollout", "reward"):
        assert prometheus.values(f'up{{job="{job}", run="{RUN}"}}') == [1.0]
    assert prometheus.values(f'penstock_services{{kind="agent", run="{RUN}"}}') == []  # it makes no episodes


def test_every_panel_and_mark_shows_data(prometheus: Prometheus) -> None:
    asked = [
        (f"{board}: {title}", filled_in(expression, run_of(board, title))) for board, title, expression in queries()
    ]
    assert len(asked) > 100
    ask_all(prometheus, asked)


def test_runs_are_kept_apart(prometheus: Prometheus) -> None:
    """No query finds anything of another run, nor a label of one."""
    found = {}
    for board, title, expression in queries():
        run = run_of(board, title)
        series = prometheus.get("query", query=filled_in(expression, run))["result"]
        runs = {each["metric"]["run"] for each in series if "run" in each["metric"]}
        assert runs <= {run}, (board, title)
        found[board, title] = prometheus.values(filled_in(expression, "nobody"))
    assert {name: values for name, values in found.items() if values} == {}


def test_the_list_of_alerts_is_that_of_the_run(prometheus: Prometheus) -> None:
    [query] = [expression for _, title, expression in queries() if title.startswith("Firing alerts")]

    def names(run: str) -> set[str]:
        return {each["metric"]["alertname"] for each in prometheus.get("query", query=filled_in(query, run))["result"]}

    expected = {"PenstockNonFiniteStep", "PenstockDeadLetters"}
    wait_until(lambda: names(EPISODES) >= expected, 30, lambda: names(EPISODES))
    assert names(RUN) == set()


def test_marks_are_at_the_moment_of_their_event(prometheus: Prometheus, system: System) -> None:
    configured = system.targets.parents[1] / "config.yaml"
    begun = configured.stat().st_mtime - 1  # starts of processes are known to the second
    for _, title, expression in queries():
        if title in ("Checkpoints", "Pushes of weights", "Starts of services"):
            moments = [value / 1000 for value in prometheus.values(filled_in(expression, RUN))]
            assert moments
            assert all(begun <= moment <= time.time() for moment in moments), title


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
    firing = [alert["labels"] for rule in alerts for alert in rule["alerts"] if alert["state"] == "firing"]
    assert [labels for labels in firing if labels.get("run") != EPISODES] == []


def test_the_figures_are_those_of_the_run(prometheus: Prometheus, system: System) -> None:
    [steps] = prometheus.values(f'penstock_trainer_run_steps{{run="{RUN}"}}')
    assert 3 <= steps <= system.launch.num_steps()
    [gap] = prometheus.values(f'run:penstock_gap_to_ideal:ratio15m{{run="{RUN}"}}')
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

"""Dashboards, rules and their docs agree with each other and with what the services export."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.__main__ import files
from deploy.grafana.panels import Figure, Graph, Query, as_json, make_dashboard
from penstock_agent.metrics import AgentMetrics
from penstock_reward.metrics import RewardMetrics
from penstock_rollout.metrics import RolloutMetrics
from penstock_trainer.telemetry.metrics import TrainerMetrics

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus" / "rules"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
METRIC = re.compile(r"(?<![\w:])(?:run:)?(?:penstock|process)_\w+(?::\w+)?")


def rules(file: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def exported() -> set[str]:
    """Names of all samples that the services export; a metric with labels has no sample before its first event."""
    services = (RolloutMetrics(), AgentMetrics(), RewardMetrics(), TrainerMetrics())
    names = set()
    for family in (family for each in services for family in each.registry.collect()):
        present = {sample.name for sample in family.samples}
        names |= present or {family.name + suffix for suffix in SUFFIXES[family.type]}
    return names


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(text) for text in files().values()]


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Without the headings between them."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def rows(board: dict[str, Any]) -> list[list[str]]:
    """The titles of the panels below each heading."""
    found: list[list[str]] = [[]]
    for panel in board["panels"]:
        if panel["type"] == "row":
            found.append([])
        else:
            found[-1].append(panel["title"])
    return found


def queries() -> Iterator[str]:
    for board in dashboards():
        yield from (target["expr"] for panel in panels(board) for target in panel["targets"])
        yield from (event["expr"] for event in board["annotations"]["list"])


def expressions() -> Iterator[str]:
    yield from queries()
    for rule in (*rules("recording.yml"), *rules("alerts.yml")):
        yield rule["expr"]


def test_every_metric_that_is_asked_for_exists() -> None:
    known = exported() | {rule["record"] for rule in rules("recording.yml")}
    asked = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert asked - known == set()
    assert len(asked) > 50


def test_every_recorded_figure_is_used() -> None:
    text = "\n".join(expressions())
    assert [rule["record"] for rule in rules("recording.yml") if rule["record"] not in text] == []


def test_every_alert_has_a_runbook_paragraph_and_a_test() -> None:
    alerts = [rule["alert"] for rule in rules("alerts.yml")]
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    assert headings == alerts
    cases = yaml.safe_load((ROOT / "deploy" / "prometheus" / "tests" / "alerts_test.yml").read_text())["tests"]
    asked = [case for test in cases for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in asked if case.get("exp_alerts")} == set(alerts)  # it fires
    assert {case["alertname"] for case in asked if not case.get("exp_alerts")} == set(alerts)  # and sometimes not


def test_every_alert_says_where_its_runbook_is_and_how_bad_it_is() -> None:
    for rule in rules("alerts.yml"):
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert "run" in rule["annotations"]["summary"].lower()


def test_every_query_selects_one_run() -> None:
    for query in queries():
        names = re.findall(r"(?<![\w:])(?:(?:run:)?(?:penstock|process)_[\w:]+|ALERTS\w*|up)(?=\{)", query)
        assert len(names) == query.count("{") == query.count('{run="$run"'), query
        assert names
        assert len(METRIC.findall(query)) <= len(names), query  # none without braces
    for board in dashboards():
        [run] = [each for each in board["templating"]["list"] if each["name"] == "run"]
        assert (run["multi"], run["includeAll"]) == (False, False)


def test_the_overview_answers_in_the_order_in_which_a_person_asks() -> None:
    [board] = [board for board in dashboards() if board["uid"] == "penstock-overview"]
    assert [panel["title"] for panel in board["panels"] if panel["type"] == "row"] == [
        *("Is it learning?", "What of each batch is lost?", "Is it alive?", "Is it fast?")
    ]
    page = (ROOT / "docs" / "dashboards.md").read_text()
    assert [panel["title"] for panel in panels(board) if f"**{panel['title']}**" not in page] == []


def test_details_are_a_dashboard_that_exists_with_the_same_run_and_time() -> None:
    paths = {f"/d/{board['uid']}" for board in dashboards()}
    urls = [link["url"] for board in dashboards() for panel in panels(board) for link in panel["links"]]
    assert urls
    for path, _, variables in (url.partition("?") for url in urls):
        assert path in paths
        assert variables == "${__url_time_range}&${__all_variables}"
    for board in dashboards():
        [link] = board["links"]
        assert (link["type"], link["includeVars"], link["keepTime"]) == ("dashboards", True, True)
        assert set(link["tags"]) == set(board["tags"])


def test_curves_mark_the_events_of_the_run() -> None:
    for board in dashboards():
        ids = {panel["title"]: panel["id"] for panel in panels(board)}
        events = {each["name"]: each for each in board["annotations"]["list"]}
        pushes = events.pop("Pushes of weights", None)
        assert list(events) == [
            *("Checkpoints", "Steps that were not finite", "Starts of services", "Restarts of engines")
        ]
        assert all(each["enable"] and each["titleFormat"] and each["iconColor"] for each in events.values())
        assert [name for name, each in events.items() if not each["useValueForTime"]] == ["Restarts of engines"]
        if board["uid"] == "penstock-overview":
            assert pushes["filter"] == {"exclude": False, "ids": [ids["KL divergence"], ids["Versions"]]}


def test_every_panel_has_a_unit_and_a_description_and_its_place() -> None:
    for board in dashboards():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            assert panel["title"]
            if panel["type"] != "row":
                assert panel["description"].endswith("."), panel["title"]
                assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            place = panel["gridPos"]
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24
            taken |= cells
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        assert max(map(len, rows(board))) <= 20
        height = max(y for _, y in taken) + 1
        assert len(taken) == 24 * height  # no holes


def test_dashboards_have_names_of_their_own_and_the_same_variables() -> None:
    boards = dashboards()
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == 5
    for board in boards:
        assert [each["name"] for each in board["templating"]["list"]] == ["datasource", "run", "window"]
        for panel in panels(board):
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert {source["uid"] for source in sources} == {"${datasource}"}


def test_dashboards_are_what_the_schema_says() -> None:
    register_default_plugins()
    for board in dashboards():
        read = json.loads(as_json(Dashboard.from_json(board)))
        for event in board["annotations"]["list"]:  # without what the schema leaves to the data source
            for key in ("titleFormat", "textFormat", "useValueForTime"):
                del event[key]
        assert read == board


def test_a_row_that_mixes_kinds_is_refused() -> None:
    figure = Figure("A figure", "Text.", "none", Query("up"))
    with pytest.raises(ValueError, match="A graph"):
        make_dashboard("x", "X", "Text.", [figure, Graph("A graph", "Text.", "none", (Query("up"),))])


@pytest.mark.parametrize("page", ["alerts.md", "operations.md", "security.md", "local.md", "dashboards.md"])
def test_every_key_that_a_page_names_exists(page: str) -> None:
    docs = ROOT / "docs"
    known = set(re.findall(r"^\| `([\w.]+)` \|", (docs / "configuration.md").read_text(), re.MULTILINE))
    sections = {key.partition(".")[0] for key in known if "." in key}
    words = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)", (docs / page).read_text())
    named = {word for word in words if word.partition(".")[0] in sections}
    known |= {key.rpartition(".")[0] for key in known}
    assert named
    assert named - known == set()

"""summary.json, from what a trainer left in its run's folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.contracts.ledger import RunRecord, encode_record
from penstock.records import RunRecords
from penstock_launch.supervise.supervisor import RunOutcome
from penstock_launch.watch.summary import LaunchFacts, forget_trainer_summary, last_summary, make_summary, write_summary
from tests.unit.common.records.run_files import write_lines
from tests.unit.common.records.test_figures import evaluation, step

CONFIG = Config.model_validate({"actor": {"path": "m"}, "data": {"train": {"path": "d"}}})
FAILED = RunOutcome(2, "trainer ended (exit code 2): its configuration or data cannot be used", ("actor.path: ...",))


def summary_of(folder: Path, outcome: RunOutcome, started_at: float = 90.0) -> dict[str, Any]:
    restarts = {"trainer": 0, "rollout": 2}
    facts = LaunchFacts(started_at, {"trainer": 10**9, "total": 2 * 10**9}, restarts, {}, outcome)
    return make_summary(folder, CONFIG, facts)


def test_summary_holds_what_the_trainer_wrote_and_what_the_launcher_knows(tmp_path: Path) -> None:
    trainer = {"engine": "sglang 0.5.21", "steps": 2, "tickets": {"issued": 4, "outstanding": 0}}
    (tmp_path / "trainer_summary.json").write_text(json.dumps(trainer))
    write_lines(tmp_path / "steps.jsonl", step(0, 0.5), step(1, 0.5))
    write_summary(tmp_path, summary_of(tmp_path, RunOutcome(0, "finished")))
    written = json.loads((tmp_path / "summary.json").read_text())
    assert {key: written[key] for key in trainer} == trainer
    assert (written["model"], written["reward_mean_last"], written["seconds_setup"]) == ("m", 0.5, 10.0)
    assert written["peak_rss_bytes"] == {"trainer": 10**9, "total": 2 * 10**9}
    assert written["restarts"] == {"trainer": 0, "rollout": 2}
    assert written["exit"] == {"code": 0, "reason": "finished", "lines": []}


def test_a_run_whose_trainer_wrote_no_summary_has_the_figures_of_its_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "steps.jsonl", *(step(n, n / 10) for n in range(4)))
    write_lines(tmp_path / "evals.jsonl", evaluation(0, 0.1), evaluation(2, 0.3))
    (tmp_path / "trainer_summary.json").write_text('{"steps": 4')  # cut off
    found = summary_of(tmp_path, FAILED)
    assert (found["exit"]["code"], found["steps"], found["seconds_training"]) == (2, 4, 8.0)
    assert (found["heldout_reward_start"], found["heldout_reward_end"]) == (0.1, 0.3)


def test_the_model_of_an_earlier_launch_is_known_by_its_steps(tmp_path: Path) -> None:
    stopped, finished = RunOutcome(130, "stopped by Ctrl-C"), RunOutcome(0, "finished")
    write_lines(tmp_path / "steps.jsonl", *(step(n, 0.5) for n in range(4)))
    assert "final_steps" not in summary_of(tmp_path, stopped)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    found = [summary_of(tmp_path, outcome)["final_steps"] for outcome in (stopped, finished)]
    assert found == [None, 4], "an earlier release wrote no steps, but has written the model if it finished"
    (tmp_path / "final" / "trained.json").write_text('{"steps": 2}')
    assert summary_of(tmp_path, stopped)["final_steps"] == 2
    write_summary(tmp_path, summary_of(tmp_path, stopped))
    assert last_summary(RunRecords(tmp_path))["final_steps"] == 2


def test_set_up_is_that_of_this_launch(tmp_path: Path) -> None:
    write_lines(tmp_path / "steps.jsonl", step(0, 0.5), step(1, 0.5), step(2, 0.5, started_at=5030.0))
    found = summary_of(tmp_path, RunOutcome(0, "finished"), started_at=5000.0)
    assert (found["steps"], found["steps_of_launch"], found["seconds_setup"]) == (3, 1, 30.0)
    again = summary_of(tmp_path, RunOutcome(0, "finished"), started_at=9000.0)  # it had nothing left to train
    assert (again["steps_of_launch"], again["seconds_setup"]) == (0, None)


def test_the_plan_of_the_configuration_and_the_evaluations_that_it_lacks(tmp_path: Path) -> None:
    record = encode_record(RunRecord("d", 100, 8, 4, 0))
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "ledger.jsonl").write_bytes(record + b"\n")
    write_lines(tmp_path / "steps.jsonl", *(step(n, 0.5, started_at=100.0 + n) for n in range(7)))
    write_lines(tmp_path / "evals.jsonl", evaluation(0, 0.1), evaluation(2, 0.3))
    data = {"train": {"path": "d"}, "eval": {"path": "e"}}
    config = Config.model_validate({"actor": {"path": "m"}, "data": data, "eval": {"every_steps": 2}})
    facts = LaunchFacts(90.0, {}, {}, {}, RunOutcome(0, "finished"))
    found = make_summary(tmp_path, config, facts)
    assert (found["steps_planned"], found["heldout_missing"]) == (13, [4, 6, 7])
    resumed = make_summary(tmp_path, config, replace(facts, started_at=104.5))  # the last two steps are its own
    assert resumed["heldout_missing"] == [6, 7]
    assert summary_of(tmp_path, FAILED)["heldout_missing"] == [], "it has no data.eval"


@pytest.mark.parametrize("name", ["steps.jsonl", "evals.jsonl", "steps/ledger.jsonl"])
def test_files_that_cannot_be_read_are_named_and_end_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "steps").mkdir()
    (tmp_path / name).write_text("{}\n")
    found = summary_of(tmp_path, FAILED)
    assert str(tmp_path) in found["unreadable"]
    assert found["exit"]["code"] == 2


def test_a_summary_of_an_earlier_launch_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "trainer_summary.json").write_text('{"steps": 4}')
    forget_trainer_summary(tmp_path)
    forget_trainer_summary(tmp_path)
    assert summary_of(tmp_path, FAILED)["steps"] == 0

"""summary.json and the closing report, from a fabricated summary of a trainer."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock_launch.supervise.supervisor import RunOutcome
from penstock_launch.watch.summary import LaunchFacts, closing_report, forget_trainer_summary, merge, write_summary

STARTED_AT = 1_700_000_000.0


@pytest.fixture
def trainer() -> dict[str, Any]:
    return {
        "engine": "sglang 0.5.21",
        "model": "smollm2",
        "steps": 40,
        "non_finite_steps": 2,
        "training_started_at": STARTED_AT + 31.5,
        "seconds_training": 72.0,
        "seconds_to_reward_0_9": 60.0,
        "heldout_accuracy_start": 0.25,
        "heldout_accuracy_end": 0.95,
        "heldout_prompts": 20,
        "heldout_prompts_trained": 0,
        "staleness_max": 1,
        "max_staleness": 1,
        "tickets": {"issued": 322, "trained": 320, "dropped": {"poison": 1}, "outstanding": 1},
        "generation_tokens_per_second": 310.4,
        "gap_to_ideal": 0.12,
        "samples_before": [{"prompt": "2+5=7\n8+4=12\n3+9=", "completion": "11\n", "answer": "12", "reward": 0.0}],
        "samples_after": [{"prompt": "2+5=7\n8+4=12\n3+9=", "completion": "12\n", "answer": "12", "reward": 1.0}],
    }


def facts(outcome: RunOutcome) -> LaunchFacts:
    return LaunchFacts(STARTED_AT, {"trainer": 10**9, "total": 2 * 10**9}, {"trainer": 0, "rollout": 2}, {}, outcome)


def test_summary_holds_what_the_trainer_wrote_and_what_the_launcher_knows(
    tmp_path: Path, trainer: dict[str, Any]
) -> None:
    (tmp_path / "trainer_summary.json").write_text(json.dumps(trainer))
    write_summary(tmp_path, facts(RunOutcome(0, "finished")))
    written = json.loads((tmp_path / "summary.json").read_text())
    assert {key: written[key] for key in trainer} == trainer
    assert written["seconds_setup"] == 31.5
    assert written["peak_rss_bytes"] == {"trainer": 10**9, "total": 2 * 10**9}
    assert written["restarts"] == {"trainer": 0, "rollout": 2}
    assert written["exit"] == {"code": 0, "reason": "finished", "lines": []}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["summary.json", "trainer_summary.json"]


def test_summary_says_how_it_ended_where_the_trainer_wrote_nothing(tmp_path: Path) -> None:
    outcome = RunOutcome(
        2, "trainer ended (exit code 2): its configuration or data cannot be used", ("actor.path: ...",)
    )
    document = write_summary(tmp_path, facts(outcome))
    assert document["seconds_setup"] is None
    assert document["exit"]["code"] == 2
    report = "\n".join(closing_report(document, tmp_path, "resume"))
    assert "to go on    the same command;" in report
    assert "--run.existing resume" in "\n".join(closing_report(document, tmp_path, "replace"))
    assert "Ended with exit code 2: trainer ended (exit code 2)" in report
    assert "    actor.path: ..." in report


def test_a_summary_that_is_cut_off_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "trainer_summary.json").write_text('{"steps": 4')
    assert write_summary(tmp_path, facts(RunOutcome(1, "x")))["seconds_setup"] is None


def test_a_summary_of_an_earlier_launch_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "trainer_summary.json").write_text('{"steps": 4}')
    forget_trainer_summary(tmp_path)
    forget_trainer_summary(tmp_path)
    assert "steps" not in write_summary(tmp_path, facts(RunOutcome(1, "x")))


def test_report_shows_completions_before_and_after_and_the_results(trainer: dict[str, Any]) -> None:
    report = "\n".join(closing_report(merge(trainer, facts(RunOutcome(0, "finished"))), Path("runs/demo"), "resume"))
    assert report.index("Completions before training:") < report.index("Completions after training:")
    assert "3+9= -> '11\\n'   expected '12'   reward 0" in report
    assert "3+9= -> '12\\n'   expected '12'   reward 1" in report
    assert "Finished: 40 steps in 1:12 of training, after 0:32 of set-up." in report
    assert "0.25 before, 0.95 after, on prompts that it never trained on" in report
    assert "loss or gradient of 2 of 40 steps" in report
    assert "322 issued = 320 trained + 1 dropped + 1 outstanding" in report
    assert "rollout 2" in report
    assert "2000 MB" in report
    assert "runs/demo/summary.json" in report


def test_report_says_how_many_held_out_prompts_were_trained(trainer: dict[str, Any]) -> None:
    summary = merge({**trainer, "heldout_prompts_trained": 3}, facts(RunOutcome(0, "finished")))
    report = "\n".join(closing_report(summary, Path("runs/demo"), "resume"))
    assert "0.25 before, 0.95 after; of its 20 prompts 3 are training prompts too" in report
    assert "never trained on" not in report


def test_report_shows_the_episodes(trainer: dict[str, Any]) -> None:
    episodes = {"turns": 2.26, "tool_calls": 1.5, "branches_edited": 0.5, "branches_template": 0.25}
    episodes |= {"failed_ratio": 0.0125, "cached_tokens_ratio": 0.8}
    summary = merge({**trainer, "episodes": episodes}, facts(RunOutcome(0, "x")))
    report = "\n".join(closing_report(summary, Path("runs/demo"), "resume"))
    assert (
        "2.3 turns, 1.5 tool calls and 0.8 branches each; 1.2% failed; 80% of the prompt tokens were cached" in report
    )
    assert "episodes" not in "\n".join(closing_report(merge(trainer, facts(RunOutcome(0, "x"))), Path("r"), "resume"))

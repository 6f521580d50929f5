"""The figures of a run from its files: over lives, dropped groups and evaluations of other prompts."""

from pathlib import Path
from typing import Any

import pytest

from penstock.contracts import DropReason
from penstock.contracts.ledger import DropRecord, Record, StepRecord, encode_record
from penstock.errors import DataError
from penstock.records.run import RunRecords
from tests.unit.common.records.run_files import write_lines


def step(number: int, reward: float, *, started_at: float | None = None, **changes: Any) -> dict[str, Any]:
    """Two seconds, of which training took one."""
    began = 100.0 + 2 * number if started_at is None else started_at
    statistics = {"num_completions": 7, "num_failed_completions": 1, "num_truncated_completions": 2}
    statistics |= {"num_groups": 2, "num_failed_groups": 0, "num_degenerate_groups": 1}
    return {
        **{
            "step": number,
            "version": number + 1,
            "epoch": (number + 1) / 4,
            "started_at": began,
            "ended_at": began + 2,
        },
        **{"seconds": {"step": 2.0, "forward_backward": 1.0}, "generation_seconds": 0.5, "generated_tokens": 10},
        **{"reward_mean": reward, "staleness_max": 1, "statistics": statistics, "failures": {"timeout": 1}},
        **changes,
    }


def evaluation(steps: int, reward: float, **changes: Any) -> dict[str, Any]:
    return {
        **{"steps": steps, "accuracy": 0.0, "reward_mean": reward, "num_prompts": 4, "num_failed": 0, "samples": []},
        **{"failures": {}, "success": 1.0, "prompts": "d", "num_trained": 0},
        **changes,
    }


def figures_of(
    folder: Path, steps: list[dict[str, Any]], evaluations: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    write_lines(folder / "steps.jsonl", *steps)
    write_lines(folder / "evals.jsonl", *(evaluations or []))
    return RunRecords(folder).figures()


def test_rewards_are_of_the_first_and_the_last_steps(tmp_path: Path) -> None:
    graded = [step(n, 0.1 * n) for n in range(12)]
    found = figures_of(tmp_path, graded)
    assert (found["reward_mean_first"], found["reward_mean_last"]) == (pytest.approx(0.2), pytest.approx(0.9))
    few = figures_of(tmp_path, graded[:5])
    assert (few["reward_window_steps"], few["reward_mean_first"], few["reward_mean_last"]) == (
        2,
        pytest.approx(0.05),
        pytest.approx(0.35),
    )
    one = figures_of(tmp_path, graded[1:2])
    assert (one["reward_window_steps"], one["reward_mean_first"], one["reward_mean_last"]) == (1, 0.1, 0.1)
    assert figures_of(tmp_path, [])["reward_mean_last"] is None


def test_a_night_between_two_lives_is_no_time_of_training(tmp_path: Path) -> None:
    later = [step(n, 1.0, started_at=100.0 + 2 * n + 40_000) for n in range(3, 6)]
    found = figures_of(tmp_path, [*(step(n, 1.0) for n in range(3)), *later], [evaluation(4, 1.0, accuracy=1.0)])
    assert (found["steps"], found["seconds_training"], found["epochs"]) == (6, 12.0, 1.5)
    assert (found["seconds_to_reward_0_9"], found["seconds_to_heldout_0_9"]) == (10.0, 8.0)


def test_failures_and_missing_signals_are_counted_over_steps_and_dropped_groups(tmp_path: Path) -> None:
    records: list[Record] = [
        StepRecord(0, (0, 1), "00000000.1.pack", "e" * 16),
        StepRecord(1, (2, 3), "00000001.1.pack", "f" * 16),
        DropRecord(4, DropReason.REWARD_FAILED, num_completions=4, failures={"timeout": 1, "ValueError": 3}),
        DropRecord(5, DropReason.DEGENERATE, num_completions=4),
        DropRecord(6, DropReason.POISON, why="no ScoredHeader"),
    ]
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "ledger.jsonl").write_bytes(b"".join(encode_record(each) + b"\n" for each in records))
    found = figures_of(tmp_path, [step(0, 0.5), step(1, 0.5)])
    assert found["tickets"] == {"trained": 4, "dropped": {"reward_failed": 1, "degenerate": 1, "poison": 1}}
    assert found["completions"] == {"num": 24, "of_steps": 16, "failed": 6, "truncated": 4}
    assert found["failures"] == {"timeout": 3, "ValueError": 3}
    assert found["groups"] == {"num": 6, "no_signal": 4}
    assert found["lost_messages"] == {"no ScoredHeader": 1}


def test_training_sets_have_figures_of_their_own_with_what_was_dropped(tmp_path: Path) -> None:
    records: list[Record] = [
        StepRecord(0, (0, 1, 4), "00000000.1.pack", "e" * 16),
        DropRecord(2, DropReason.DEGENERATE, num_completions=4, dataset="easy"),
        DropRecord(3, DropReason.STALE, num_completions=4, dataset="hard"),
    ]
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "ledger.jsonl").write_bytes(b"".join(encode_record(each) + b"\n" for each in records))
    easy = {"num_prompts": 3, "num_rewards": 6, "reward_mean": 0.5, "no_signal_ratio": 1 / 3}
    more = {"num_prompts": 1, "num_rewards": 2, "reward_mean": 1.0, "no_signal_ratio": 1.0}
    none = {"num_prompts": 1, "num_rewards": 0, "no_signal_ratio": 1.0}
    lines = [step(0, 0.5, sets={"easy": easy, "unlucky": none}), step(1, 0.5, sets={"easy": more})]
    assert figures_of(tmp_path, lines)["sets"] == {
        "easy": {"prompts": 4, "reward_mean": 0.625, "dropped": {"degenerate": 1}, "no_signal": 3},
        "hard": {"prompts": 0, "reward_mean": None, "dropped": {"stale": 1}, "no_signal": 0},
        "unlucky": {"prompts": 1, "reward_mean": None, "dropped": {}, "no_signal": 1},
    }
    (tmp_path / "steps" / "ledger.jsonl").unlink()
    assert "sets" not in figures_of(tmp_path, [step(0, 0.5)])


def test_lines_of_an_older_release_count_what_they_have(tmp_path: Path) -> None:
    old = step(0, 0.5)
    del old["failures"], old["statistics"]["num_truncated_completions"]
    older = evaluation(0, 0.5)
    for name in ("failures", "success", "prompts", "num_trained"):
        del older[name]
    found = figures_of(tmp_path, [old], [older])
    assert found["completions"] == {"num": 8, "of_steps": 8, "failed": 1, "truncated": None}
    assert (found["heldout_prompts_trained"], found["heldout_reward_start"]) == (None, 0.5)


def test_before_and_after_are_of_the_same_prompts(tmp_path: Path) -> None:
    """data.eval and eval.success may change between two starts."""
    lines = [evaluation(0, 0.1, prompts="other"), evaluation(10, 0.2), evaluation(30, 0.4), evaluation(20, 0.3)]
    found = figures_of(tmp_path, [step(0, 0.5)], lines)
    assert (found["heldout_steps_start"], found["heldout_steps_end"]) == (10, 30)
    assert (found["heldout_reward_start"], found["heldout_reward_end"]) == (0.2, 0.4)
    found = figures_of(tmp_path, [step(0, 0.5)], [evaluation(0, 0.1, success=0.5), evaluation(10, 0.2)])
    assert (found["heldout_steps_start"], found["heldout_steps_end"]) == (10, 10)


def test_intervals_and_pass_at_k_are_of_both_evaluations_and_of_none_in_lines_of_earlier_releases(
    tmp_path: Path,
) -> None:
    at = {"4": {"value": 0.75, "low": 0.3, "high": 0.95}}
    new = evaluation(10, 0.5, accuracy_interval={"low": 0.2, "high": 0.8}, pass_at=at)
    found = figures_of(tmp_path, [step(0, 0.5)], [evaluation(0, 0.5), new])
    assert (found["heldout_pass_at_start"], found["heldout_accuracy_interval_start"]) == ({}, {})
    assert found["heldout_pass_at_end"] == at
    assert found["heldout_accuracy_interval_end"] == {"low": 0.2, "high": 0.8}


def test_an_evaluation_without_any_reward_has_no_mean(tmp_path: Path) -> None:
    lost = evaluation(10, 0.0, num_failed=4, failures={"timeout": 4})
    found = figures_of(tmp_path, [step(0, 0.5)], [evaluation(0, 0.5), lost])
    assert (found["heldout_reward_start"], found["heldout_reward_end"]) == (0.5, None)
    assert (found["heldout_failed_end"], found["heldout_failures"]) == (4, {"timeout": 4})
    assert found["heldout_accuracy_end"] is None


def test_a_failed_reward_is_in_no_accuracy_also_of_a_release_that_counted_it_as_wrong(tmp_path: Path) -> None:
    old = evaluation(0, 0.5, accuracy=0.5, num_failed=1)  # 2 of 4
    new = evaluation(10, 0.5, accuracy=1.0, num_scored=3, num_failed=1)
    found = figures_of(tmp_path, [step(n, 0.5) for n in range(10)], [old, new])
    assert found["heldout_accuracy_start"] == pytest.approx(2 / 3)
    assert (found["heldout_accuracy_end"], found["heldout_failed_start"], found["heldout_failed_end"]) == (1.0, 1, 1)
    assert found["seconds_to_heldout_0_9"] == 20.0


@pytest.mark.parametrize("line", ["7", "{}", '{"step": 0, "seconds": 3}', "junk"])
def test_a_broken_line_is_an_error_that_names_the_folder(tmp_path: Path, line: str) -> None:
    (tmp_path / "steps.jsonl").write_text(f"{line}\n")
    with pytest.raises(DataError, match=tmp_path.name):
        RunRecords(tmp_path).figures()


def test_a_later_line_without_its_time_is_broken_too(tmp_path: Path) -> None:
    later = step(1, 0.5)
    del later["started_at"]
    with pytest.raises(DataError, match="started_at"):
        figures_of(tmp_path, [step(0, 0.5), later])


def test_each_further_set_has_the_figures_of_the_main_one(tmp_path: Path) -> None:
    at = {"1": {"value": 0.5, "low": 0.2, "high": 0.8}}
    hard = evaluation(10, 0.5, accuracy=0.5, num_scored=3, num_failed=1, prompts="h", set="hard", pass_at=at)
    lines = [hard, evaluation(0, 0.25), evaluation(0, 0.1, set="hard", prompts="h", accuracy=0.25, num_scored=4)]
    found = figures_of(tmp_path, [step(0, 0.5)], lines)
    assert list(found["heldout_sets"]) == ["hard"]
    figures = found["heldout_sets"]["hard"]
    assert (figures["steps_start"], figures["accuracy_start"], figures["reward_start"]) == (0, 0.25, 0.1)
    assert (figures["steps_end"], figures["accuracy_end"], figures["failed_end"]) == (10, 0.5, 1)
    assert (figures["digest"], figures["pass_at_end"], figures["prompts"]) == ("h", at, 4)
    alone = figures_of(tmp_path, [step(0, 0.5)], [evaluation(0, 0.25, set="main")])
    assert {name: value for name, value in alone.items() if name != "heldout_sets"} == {
        name: value for name, value in found.items() if name != "heldout_sets"
    }, "the figures of a run are those of its main set"
    assert {f"heldout_{name}" for name in figures} == {n for n in alone if n.startswith("heldout_")} - {"heldout_sets"}

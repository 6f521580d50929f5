"""`penstock runs` and `penstock compare`, from the folders of runs."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import RunRecord, StepRecord, WeightsRecord, encode_record
from penstock.errors import ConfigError
from penstock_launch.__main__ import run
from penstock_launch.commands.compare import compare_runs
from penstock_launch.commands.runs import show_runs
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.checkpoints.settings import SettingsFiles
from tests.unit.common.records.run_files import write_lines
from tests.unit.common.records.test_figures import evaluation
from tests.unit.launch.commands.folders_of_runs import make_run, write_log


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_runs_are_listed_by_their_start_with_state_and_rewards(tmp_path: Path) -> None:
    make_run(tmp_path / "later", [0.0, 0.5, 1.0], code=130, started_at=2e9)
    make_run(tmp_path / "earlier", [0.1 * n for n in range(10)], started_at=1e9)
    write_log(make_run(tmp_path / "failed", [], code=4), "launcher", "2026-11-30T16:34:55Z [   0.0 s] run failed: new")
    (tmp_path / "notes").mkdir()
    (tmp_path / "later.targets.json").write_text("[]")
    head, *rows, note = show_runs(str(tmp_path))
    assert cells(head) == [
        "run",
        "state",
        "steps",
        "reward",
        "accuracy",
        "held-out reward",
        "started",
        "training",
        "model",
    ]
    assert [cells(row)[0] for row in rows] == ["earlier", "failed", "later"]
    earlier = cells(rows[0])
    assert earlier[1:6] == ["finished", "10", "0.20 -> 0.70", "0.00 -> 0.00", "0.25 -> 0.75"]
    assert earlier[6].startswith("2001-09-0")
    assert earlier[7:] == ["0:20", "models/tiny"]
    assert cells(rows[1])[1:6] == ["failed", "0", "-", "0.00", "0.75"]
    assert cells(rows[2])[1:4] == ["stopped", "3", "0.00 -> 1.00"]
    assert note == "1 folder is no run"


def test_a_run_starts_when_its_first_launch_begins(tmp_path: Path) -> None:
    """Before its first step, after it, and after a later launch."""
    folder = make_run(tmp_path / "r", [], code=None)
    launched = datetime(2026, 11, 30, 16, 34, 55, tzinfo=UTC)

    def started() -> str:
        return cells(show_runs(str(tmp_path))[1])[6]

    assert started() == "-"
    make_run(folder, [0.5], started_at=launched.timestamp() + 88)
    shown = "%Y-%m-%d %H:%M"
    assert started() == (launched + timedelta(seconds=88)).astimezone().strftime(shown)  # no launcher's log
    write_log(folder, "launcher", "2026-11-30T16:34:55Z [   0.0 s] run r: new", "a line without a time")
    write_log(folder, "launcher", "2026-11-30T17:02:11Z [   0.0 s] run r: continues")
    assert started() == launched.astimezone().strftime(shown)


@pytest.mark.parametrize("name", ["steps.jsonl", "evals.jsonl", "config.yaml"])
def test_a_run_with_a_broken_file_has_a_row_that_says_so(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "broken", [0.5])
    (tmp_path / "broken" / name).write_text("a: b: c\n")
    make_run(tmp_path / "fine", [0.5])
    rows = {cells(row)[0]: row for row in show_runs(str(tmp_path))[1:]}
    assert "cannot be read" in rows["broken"]
    assert cells(rows["fine"])[1] == "finished"


def test_failed_held_out_rewards_are_counted_beside_the_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, [0.5])
        last = evaluation(1, 0.5, accuracy=1.0, num_scored=3, num_failed=1)
        write_lines(tmp_path / name / "evals.jsonl", evaluation(0, 0.25), last)
    assert "0.00 -> 1.00 (of 3; 1 failed)  0.25 -> 0.50 " in show_runs(str(tmp_path))[1]
    run(["compare", "a", "b", "--root", str(tmp_path)])
    lines = [cells(line) for line in capsys.readouterr().out.splitlines()]
    assert ["accuracy, after", "1.00 (of 3; 1 failed)", "1.00 (of 3; 1 failed)"] in lines
    assert ["held-out reward, before", "0.25", "0.25"] in lines


def test_no_run_is_no_error(tmp_path: Path) -> None:
    assert show_runs(str(tmp_path / "none")) == [f"no run in {tmp_path / 'none'}"]


def test_runs_are_compared_by_keys_figures_and_rewards_after_the_same_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a", [0.1 * n for n in range(10)], optimizer={"lr": 1e-6}, kl_ctl=0.0)
    make_run(tmp_path / "b", [0.5] * 4, code=130, optimizer={"lr": 1e-5, "eps": 1}, kl_ctl=0.0)
    assert run(["compare", "a", str(tmp_path / "b"), "--root", str(tmp_path)]) == 0
    lines = [cells(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[2:4] == [["optimizer.lr", "1e-06", "1e-05"], ["optimizer.eps", "(not there)", "1"]]
    assert ["state", "finished", "stopped"] in lines
    assert ["training reward, last", "0.70", "0.50"] in lines
    assert ["training time", "0:20", "0:08"] in lines
    assert ["completions without a reward", "12%", "12%"] in lines
    assert ["groups without a signal", "50%", "50%"] in lines
    assert lines[-4:] == [["1", "0.00", "0.50"], ["2", "0.05", "0.50"], ["3", "0.10", "0.50"], ["4", "0.15", "0.50"]]


def test_a_key_that_was_changed_on_resume_is_compared_with_all_its_values(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, [0.5] * 4, optimizer={"lr": 1e-5})
    journal = Journal(tmp_path / "a" / "steps")
    files = SettingsFiles(tmp_path / "a" / "steps")
    for step, rate in enumerate((2e-5, 2e-5, 1e-5, 3e-5, 1e-5)):
        settings = files.write(config_with(optimizer={"lr": rate}))
        journal.append(StepRecord(step, (step,), "f", "d", settings=settings))
    trained_again = files.write(config_with(optimizer={"lr": 4e-5}))  # by the life after the one that committed it
    journal.append(WeightsRecord(PolicyIdentity(5, "e" * 16), 5, settings=trained_again))
    row = next(line for line in compare_runs(["a", "b"], str(tmp_path)) if "optimizer.lr" in line)
    changes = "2e-05 -> 1e-05 from step 3 on -> 3e-05 from step 4 on -> 1e-05 from step 5 on -> 4e-05 from step 5 on"
    assert cells(row) == ["optimizer.lr", changes, "1e-05"]
    for each in (tmp_path / "a" / "steps").glob("settings-*"):
        each.write_text("broken")
    assert "none" in compare_runs(["a", "b"], str(tmp_path))[1]


def config_with(**sections: object) -> Config:
    return Config.model_validate({"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}, **sections})


def test_held_out_rewards_of_other_prompts_are_not_passed_off_as_comparable(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [0.5])
    make_run(tmp_path / "b", [0.5])
    words = "held-out prompts differ: their figures cannot be compared"
    assert words not in "\n".join(compare_runs(["a", "b"], str(tmp_path)))
    evals = (tmp_path / "b" / "evals.jsonl").read_text()
    (tmp_path / "b" / "evals.jsonl").write_text(evals.replace('"prompts": "d"', '"prompts": "e"'))
    assert words in "\n".join(compare_runs(["a", "b"], str(tmp_path)))


def test_runs_without_a_step_and_of_one_name_are_compared(tmp_path: Path) -> None:
    for root in ("x", "y"):
        make_run(tmp_path / root / "r", [])
    found = compare_runs([str(tmp_path / "x" / "r"), str(tmp_path / "y" / "r")], str(tmp_path))
    assert str(tmp_path / "x" / "r") in found[found.index("figures") + 1]
    assert found[1] == "  none"
    assert "steps up to each step" not in found


def test_draws_are_compared_with_those_of_the_first_run(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = make_run(tmp_path / name, [0.5])
        (folder / "steps").mkdir()
        (folder / "steps" / "ledger.jsonl").write_bytes(encode_record(RunRecord("d", 4, 2, 2, seed)) + b"\n")
    make_run(tmp_path / "without", [0.5])
    found = compare_runs(["a", "b", "c", "without"], str(tmp_path))
    place = found.index("draws, compared with a")
    assert [cells(line)[:1] for line in found[place + 1 : place + 4]] == [["b"], ["c"], []]
    assert cells(found[place + 2]) == ["c", "not comparable: run.seed differ"]


def test_what_cannot_be_compared_is_named_with_what_is_there(tmp_path: Path) -> None:
    make_run(tmp_path / "first", [0.5])
    write_lines(tmp_path / "second" / "steps.jsonl", "junk")
    with pytest.raises(ConfigError, match=r"saw 1 run; expected at least two .*first, second"):
        compare_runs(["first"], str(tmp_path))
    with pytest.raises(ConfigError, match=r"saw 'fist'.*the nearest is 'first'"):
        compare_runs(["first", "fist"], str(tmp_path))
    assert run(["compare", "first", "second", "--root", str(tmp_path)]) == 2


def test_further_held_out_sets_have_columns_and_rows_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, [0.5])
    hard = [evaluation(n, 0.1, set="hard", accuracy=0.25 * (n + 1), num_scored=4, prompts="h") for n in range(2)]
    lines = [evaluation(0, 0.25), evaluation(1, 0.5, accuracy=1.0, num_scored=4), *hard]
    write_lines(tmp_path / "a" / "evals.jsonl", *lines)
    head, *rows = show_runs(str(tmp_path))
    assert cells(head)[4:7] == ["accuracy", "accuracy hard", "held-out reward"]
    shown = {cells(row)[0]: cells(row) for row in rows}
    assert shown["a"][4:7] == ["0.00 -> 1.00", "0.25 -> 0.50", "0.25 -> 0.50"]
    assert shown["b"][5] == "-"
    compared = [cells(line) for line in compare_runs(["a", "b"], str(tmp_path))]
    assert ["accuracy hard, before", "0.25", "-"] in compared
    assert ["accuracy hard, after", "0.50", "-"] in compared
    write_lines(tmp_path / "b" / "evals.jsonl", evaluation(0, 0.25), {**hard[0], "prompts": "other"})
    words = "prompts of the held-out set hard differ: its figures cannot be compared"
    assert words in "\n".join(compare_runs(["a", "b"], str(tmp_path)))

"""Runs are found by name and folder, and their records are read as they were written."""

import os
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.records import RunRecords, find_run, list_runs, newest_run
from tests.unit.common.records.run_files import write_lines


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("demo", "mine"):
        write_lines(tmp_path / "runs" / name / "steps.jsonl", *({"step": step} for step in range(3)))
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "demo.targets.json").write_text("[]")
    return tmp_path / "runs"


def test_runs_are_those_folders_that_hold_one(root: Path) -> None:
    assert [run.name for run in list_runs(root)] == ["demo", "mine"]
    assert list_runs(root / "none") == []


def test_a_run_is_found_by_its_name_and_by_its_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run("demo", root).folder == root / "demo"
    assert find_run(root / "demo").folder == root / "demo"
    monkeypatch.chdir(root.parent)
    assert find_run("runs/demo").folder == find_run("demo").folder == root / "demo"
    records = find_run("demo")
    monkeypatch.chdir("/")
    assert [line["step"] for line in records.steps()] == [0, 1, 2]  # a notebook may change its folder


def test_a_run_that_is_not_there_names_the_nearest_and_what_is(root: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        find_run("dmeo", root)
    assert str(refused.value) == (
        f"saw 'dmeo', which is no folder of a run and no run in {root}; expected one of demo, mine; "
        "the nearest is 'demo'"
    )
    with pytest.raises(ConfigError, match="there is none in that folder yet"):
        find_run("demo", root / "notes")


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    records = RunRecords(tmp_path / "r")
    assert (records.config(), records.summary()) == ({}, {})
    assert [*records.steps(), *records.evaluations(), *records.completions()] == []
    steps = [{"step": step, "reward_mean": step / 4, "of a later release": [step]} for step in (0, 1, 3)]
    write_lines(records.folder / "steps.jsonl", *steps)
    write_lines(records.folder / "evals.jsonl", {"steps": 0, "samples": [{"prompt": "1+1="}]})
    write_lines(records.folder / "samples.jsonl", {"step": 0, "completion": "2"})
    (records.folder / "config.yaml").write_text("run: {name: r}\noptimizer: {lr: 1.0e-06}\n")
    (records.folder / "summary.json").write_text('{"steps": 3, "exit": {"code": 0}}')
    with (records.folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # a live writer
    assert list(records.steps()) == steps
    assert [list(records.steps_after(step)) for step in (-1, 1, 3)] == [steps, steps[2:], []]
    assert list(records.evaluations()) == [{"steps": 0, "samples": [{"prompt": "1+1="}]}]
    assert list(records.completions()) == [{"step": 0, "completion": "2"}]
    assert records.config()["optimizer"] == {"lr": 1e-6}
    assert records.summary()["steps"] == 3


@pytest.mark.parametrize("name", ["steps.jsonl", "samples.jsonl", "logs/trainer.log"])
def test_the_newest_run_is_the_one_that_has_written_last(tmp_path: Path, name: str) -> None:
    """Whatever it wrote: a run that starts has logs, and no step yet."""
    for number, run in enumerate(("first", "second")):
        for file in ("config.yaml", "steps.jsonl", "samples.jsonl", "logs/trainer.log"):
            path = tmp_path / run / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (100 + number, 100 + number))
    assert newest_run(tmp_path).name == "second"
    os.utime(tmp_path / "first" / name, (200, 200))
    assert newest_run(tmp_path).name == "first"
    with pytest.raises(ConfigError, match=r"there is no run in .*: expected the name or folder of one"):
        newest_run(tmp_path / "empty")

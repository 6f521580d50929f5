"""`penstock status` of a run that does not run: how it ended, its figures, and the exit code that scripts rely on."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from penstock.config.load import load_config
from penstock_launch.__main__ import run
from tests.unit.common.records.run_files import write_processes
from tests.unit.launch.commands.folders_of_runs import make_run


def status_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    config = folder.parent / "given.yaml"
    run_section = {"name": folder.name, "root": str(folder.parent)}
    config.write_text(yaml.safe_dump({"run": run_section, "actor": {"path": "m"}, "data": {"train": {"path": "d"}}}))
    code = run(["status", "--config", str(config)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "finished: 10 steps"), (4, "failed: because, at step 10 of 25"), (130, "stopped by Ctrl-C at step 10 of 25")],
)
def test_a_run_that_ended_shows_how_and_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, state: str
) -> None:
    folder = make_run(tmp_path / "r", [0.1 * n for n in range(10)], code=code)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "steps_planned": 25}))
    exit_code, out, error = status_of(folder, capsys)
    assert (exit_code, out.splitlines()[:2], error) == (0, ["run r", f"  {state}"], "")
    assert "reward      0.20 in the first 5 steps of training, 0.70 in the last 5" in out
    assert "held-out    reward 0.25 before, 0.75 after" in out


def test_a_run_that_was_stopped_shows_the_command_to_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the launch of the run's own configuration, also of one that was moved, and it is of this run."""
    section = {"name": "r", "root": "runs"}
    folder = make_run(tmp_path / "runs" / "r", [0.5], code=130, data={"train": {"path": "d"}}, run=section)
    monkeypatch.chdir(tmp_path)

    def command() -> list[str]:
        assert run(["status", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        (shown,) = (line for line in lines if line.startswith("  go on "))
        return shlex.split(shown.partition(" launch ")[2])

    assert command() == ["local", "--config", "runs/r/config.yaml"], "run.existing is resume by itself"
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "place": "ray"}))
    folder = folder.rename(tmp_path / "moved")
    place, *words = command()
    assert place == "ray"
    config = load_config(words)
    assert (Path(config.run.root) / config.run.name).absolute() == folder
    assert config.run.existing == "resume"


def test_a_launch_without_a_queue_is_starting_or_ending(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "r", [0.5], code=None)
    write_processes(folder, run="r")
    exit_code, out, error = status_of(folder, capsys)
    assert (exit_code, error) == (0, "")
    assert re.search(r"  running: its launcher has pid \d+: it is starting or ending; logs: ", out)
    assert "Next:" not in out


def test_a_run_that_crashed_has_the_figures_of_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "r", [0.0, 1.0], code=0)
    (folder / "summary.json").write_text('{"steps": 1, "reward_mean_last": 7.0, "exit": {"code": 0}}')
    write_processes(folder, run="r", started="before")
    exit_code, out, _ = status_of(folder, capsys)
    assert exit_code == 0
    assert "  crashed: its launcher (pid " in out
    assert "0.00 in the first step of training, 1.00 in the last" in out


def test_a_summary_of_another_release_takes_nothing_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "r", [0.0, 1.0])
    tickets = '{"issued": 5, "trained": 4, "dropped": {}, "outstanding": 1}'
    (folder / "summary.json").write_text(
        f'{{"steps": 2, "completions": {{"truncated": 3}}, "tickets": {tickets}, "exit": {{"code": 0}}}}'
    )
    _, out, _ = status_of(folder, capsys)
    assert "  no reward   2 of 16 completions (12%)" in out
    assert "5 issued = 4 trained + 0 dropped + 1 outstanding" in out


def test_a_run_that_never_was_is_only_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exit_code, out, error = status_of(tmp_path / "none", capsys)
    assert (exit_code, out) == (1, "")
    assert "run 'none' is not running" in error


def test_a_run_is_named_as_in_other_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": {"path": "d"}}
    first = make_run(tmp_path / "runs" / "first", [0.0, 1.0], code=0, data=data)
    make_run(tmp_path / "runs" / "second", [0.5], code=4, data=data)
    for path in first.iterdir():
        os.utime(path, (1, 1))
    monkeypatch.chdir(tmp_path)

    def shown(*words: str) -> tuple[int, list[str], str]:
        code = run(["status", *words])
        found = capsys.readouterr()
        return code, found.out.splitlines()[:2], found.err

    ended = (0, ["run first", "  finished: 2 steps"])
    assert shown("first")[:2] == ended
    assert shown(str(first))[:2] == ended
    assert shown("first", "--redis.timeout_seconds", "2")[:2] == ended
    assert shown("first", "--root", str(tmp_path / "runs"))[:2] == ended
    assert shown()[1][0] == "run second", "it has written last"
    assert "the nearest is 'first'" in shown("frist")[2]
    code, _, error = shown("first", "--config", "x.yaml")
    assert code == 2
    assert "saw RUN 'first' and --config; expected penstock status [RUN | --config FILE]" in error
    assert "saw 'second'" in shown("first", "second")[2]
    (first / "config.yaml").unlink()
    assert "expected one there, or --config FILE instead of RUN" in shown("first")[2]

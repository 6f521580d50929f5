"""Whether a run runs, and how it ended, by its folder alone."""

from pathlib import Path

import pytest

from penstock.records import RunRecords, RunState
from penstock.runtime.process import this_machine
from tests.unit.common.records.run_files import before_the_boot, write_lines, write_processes, write_summary


def state_of(folder: Path) -> RunState:
    return RunRecords(folder).state()


def test_a_run_whose_launcher_lives_runs_whatever_an_earlier_launch_left(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_summary(folder, 0, "the trainer has finished")
    pid = write_processes(folder, run="r")
    state = state_of(folder)
    assert (state.name, state.exit_code) == ("running", None)
    assert state.launcher is not None
    assert state.launcher.pid == pid
    assert str(state) == f"running: its launcher has pid {pid}"


def test_a_launcher_that_is_gone_has_crashed_though_its_pid_was_used_again(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_summary(folder, 0, "the trainer has finished")
    pid = write_processes(folder, run="r", started="ticks:7")
    state = state_of(folder)
    assert (state.name, state.launcher) == ("crashed", None)
    assert state.reason == f"its launcher (pid {pid}) is gone, and wrote no end"
    write_processes(folder, run="r", machine=before_the_boot())
    assert state_of(folder).name == "crashed"


def test_processes_of_another_host_or_of_a_copied_folder_say_nothing(tmp_path: Path) -> None:
    write_processes(tmp_path / "r", run="r", machine=f"node7 {this_machine()}")
    assert str(state_of(tmp_path / "r")) == "unknown: it was launched on node7, which has recorded no end"
    write_processes(tmp_path / "copy", run="r")
    assert str(state_of(tmp_path / "copy")) == "unknown: the folder is a copy, made while run 'r' ran"


@pytest.mark.parametrize(
    ("code", "name"), [(0, "finished"), (130, "stopped"), (143, "stopped"), (2, "failed"), (70, "failed")]
)
def test_a_launch_that_ended_left_how(tmp_path: Path, code: int, name: str) -> None:
    write_summary(tmp_path / "r", code, "because", "the last words")
    assert state_of(tmp_path / "r") == RunState(name, "because", code, ("the last words",))  # type: ignore[arg-type]


def test_services_without_a_launcher(tmp_path: Path) -> None:
    write_lines(tmp_path / "r" / "steps.jsonl", {"step": 0})
    assert state_of(tmp_path / "r").name == "unknown"
    (tmp_path / "r" / "trainer_summary.json").write_text('{"steps": 1}')
    assert state_of(tmp_path / "r").name == "finished"
    assert RunRecords(tmp_path / "r").summary() == {"steps": 1}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"exit": 3}'])
def test_files_that_a_crash_cut_off_are_as_good_as_none(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    for name in ("summary.json", "processes.json"):
        (folder / name).write_text(text)
    assert state_of(folder).name == "unknown"

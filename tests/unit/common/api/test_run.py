"""What Python may do to a run that it has not launched, and how it reads what a launcher wrote."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import penstock
from penstock.api.launcher import last_words
from penstock.records.processes import LAUNCHER, KnownProcess, KnownProcesses
from penstock.runtime.process import ProcessIdentity, this_machine
from tests.unit.common.records.run_files import write_lines, write_processes, write_summary


def launched_by(pid: int, folder: Path, started: str = "") -> ProcessIdentity:
    """Record a process as the launcher of the run."""
    identity = ProcessIdentity.of(pid)
    assert identity is not None
    launcher = KnownProcess(LAUNCHER, pid, started or identity.started)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "processes.json").write_bytes(msgspec.json.encode(KnownProcesses("r", this_machine(), (launcher,))))
    return identity


def test_a_process_that_has_the_pid_of_a_launcher_is_never_signalled(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]) as other:
        identity = launched_by(other.pid, tmp_path / "r", started="ticks:7")
        run = penstock.open_run(tmp_path / "r")
        assert run.stop().name == "crashed"
        assert identity.alive
        with pytest.raises(penstock.RunFailedError, match=r"'r' has crashed: its launcher .* is gone"):
            run.wait()
        other.kill()


def test_a_launcher_that_does_not_end_in_time_is_left_and_said(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-S", "-c", deaf], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        identity = launched_by(other.pid, tmp_path / "r")
        run = penstock.open_run(tmp_path / "r")
        for wait in (run.stop, run.wait):
            with pytest.raises(TimeoutError, match=r"'r' has not ended within 0\.1 s; its logs are in .*/r/logs"):
                wait(0.1)
        assert identity.alive
        other.kill()


def test_a_run_of_another_host_is_not_stopped(tmp_path: Path) -> None:
    write_processes(tmp_path / "r", run="r", machine="node7 some-boot")
    write_lines(tmp_path / "r" / "steps.jsonl", {"step": 0})
    run = penstock.open_run("r", tmp_path)
    with pytest.raises(penstock.PenstockError, match=r"cannot be stopped from here: .*node7.* `penstock cancel`"):
        run.stop()
    assert list(run.follow()) == [{"step": 0}]  # and no wait for what nobody here can see


def test_a_run_that_failed_gives_its_lines_then_its_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "r" / "steps.jsonl", {"step": 0}, {"step": 1})
    write_summary(tmp_path / "r", 8, "trainer ended (exit code 8)", "training has diverged: loss is nan")
    run, lines = penstock.open_run(tmp_path / "r"), list[dict[str, Any]]()
    with pytest.raises(penstock.RunFailedError) as failed:
        run.wait(on_step=lines.append)
    assert [line["step"] for line in lines] == [0, 1]
    assert str(failed.value) == (
        "run 'r' has failed with exit code 8: trainer ended (exit code 8)\ntraining has diverged: loss is nan"
    )
    assert [each.name for each in penstock.runs(tmp_path)] == ["r"]


def test_what_a_callback_raises_ends_the_wait(tmp_path: Path) -> None:
    def refuse(line: dict[str, Any]) -> None:
        raise ZeroDivisionError(line["step"])

    launched_by(os.getpid(), tmp_path / "r")
    write_lines(tmp_path / "r" / "steps.jsonl", {"step": 0})
    with pytest.raises(ZeroDivisionError):
        penstock.open_run(tmp_path / "r").wait(on_step=refuse)


def test_tables_have_the_names_of_curves_and_a_gap_for_what_a_line_lacks(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "r" / "steps.jsonl",
        {"step": 0, "reward_mean": 0.5, "statistics": {"loss": 1.0}, "tickets": [0, 1]},
        {"step": 1, "reward_mean": 1.0, "statistics": {"loss": 2.0, "entropy": 0.25}, "tickets": [2, 3]},
        {"step": 2, "reward_mean": 1.0, "statistics": {"num_tokens": 0}, "tickets": [4]},
    )
    table = penstock.open_run(tmp_path / "r").steps()
    later = ["statistics/entropy", "statistics/num_tokens"]
    assert list(table.columns) == ["step", "reward_mean", "statistics/loss", "tickets", *later]
    assert list(table["statistics/loss"])[:2] == [1.0, 2.0]
    assert list(table["statistics/loss"].isna()) == [False, False, True]
    assert list(table["statistics/entropy"].isna()) == [True, False, True]
    assert list(table["tickets"]) == [[0, 1], [2, 3], [4]]


def test_without_pandas_a_table_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "r" / "steps.jsonl", {"step": 0})
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(penstock.PenstockError, match="expected `pip install pandas`"):
        penstock.open_run(tmp_path / "r").steps()


def test_the_last_words_of_a_launcher_are_its_error() -> None:
    lines = [
        "penstock: warning: slow",
        "[  0.1 s] run t: new",
        "penstock: config: two keys",
        "a.b: saw 1",
        "c.d: saw 2",
    ]
    assert last_words("\n".join(lines)) == lines[2:]
    assert last_words("penstock: warning: slow\nTraceback\n") == ["penstock: warning: slow", "Traceback"]
    assert last_words("") == []


def test_import_penstock_loads_nothing_else() -> None:
    """Services import it too. What is looked at first, its help, is there."""
    script = (
        "import sys, penstock; print(sorted(set(sys.modules) & {'msgspec', 'pandas', 'psutil', 'pydantic', 'yaml'}))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
    assert set(penstock.__all__) <= set(dir(penstock))
    assert all(getattr(penstock, name).__doc__ for name in penstock.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lunch'"):
        penstock.lunch  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

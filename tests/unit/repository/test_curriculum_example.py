"""The example of a run that is killed: its data, and what its program kills."""

import os
from pathlib import Path

import msgspec
import pytest

from examples.curriculum.kill import main, victims
from examples.curriculum.sums import lines
from penstock.errors import ConfigError
from penstock.records.processes import KnownProcess, KnownProcesses
from penstock.runtime.process import ProcessIdentity, this_machine

EXAMPLE = Path(__file__).parents[3] / "examples" / "curriculum"


def test_the_committed_dataset_is_what_its_program_writes() -> None:
    assert (EXAMPLE / "two_digits.jsonl").read_text().splitlines() == lines()
    assert len(set(lines())) == len(lines())


def test_only_live_processes_of_the_run_are_killed(tmp_path: Path) -> None:
    here, parent = (ProcessIdentity.of(pid) for pid in (os.getpid(), os.getppid()))
    assert here is not None
    assert parent is not None
    processes = (
        KnownProcess("trainer", here.pid, here.started),
        KnownProcess("trainer", parent.pid, "another process had this pid"),
        KnownProcess("rollout", parent.pid, parent.started),
        KnownProcess("rollout", here.pid, here.started),
    )
    known = KnownProcesses(tmp_path.name, this_machine(), processes)
    (tmp_path / "processes.json").write_bytes(msgspec.json.encode(known))
    assert victims(tmp_path, "trainer") == [here.pid]
    assert victims(tmp_path, "rollout") == [here.pid], "the service stays, and what it has started ends"
    for folder, service in ((tmp_path, "reward"), (tmp_path / "none", "trainer")):
        with pytest.raises(ConfigError, match="no live process"):
            victims(folder, service)


def test_wrong_arguments_get_a_message_and_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "reward"]) == 2
    assert "has no live process of 'reward': expected" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path)])
    assert "usage: python -m examples.curriculum.kill" in capsys.readouterr().err

"""`penstock logs`: every form of line, merged by time."""

import json
import os
import threading
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock_launch.__main__ import run
from penstock_launch.commands.logs import show_logs
from tests.patience import ANSWER_SECONDS
from tests.unit.common.records.run_files import write_processes
from tests.unit.launch.commands.folders_of_runs import make_run, write_log


def event(second: int, text: str, level: str = "info", **more: object) -> str:
    stamp = f"2026-11-30T06:37:{second:02d}.500Z"
    return json.dumps({"time": stamp, "level": level, "service": "s", "run": "r", "event": text, **more})


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines and the queue write the host's time."""
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_run(tmp_path / "demo", [0.5])
    write_log(made, "launcher", "2026-11-30T06:37:30Z [   0.0 s] run demo: new", "2026-11-30T06:37:50Z it ended")
    write_log(made, "trainer", event(31, "step 0", reward_mean=0.123456, seconds={"wait": 1.23456}))
    write_log(made, "trainer", event(41, "it failed", "error", traceback="Traceback ...\nValueError: x"), '{"cut')
    write_log(made, "queue", "27552:M 30 Nov 2026 06:37:29.192 * Ready")
    write_log(made, "engine-rollout-vm-1-aa", "no time yet", "[2026-11-30 06:37:35] up", "[2026-11-30 06:37:36] bad")
    write_log(made, "engine-rollout-vm-1-aa", "Traceback (most recent call last):", "  File x", "KeyError: 'k'")
    return made


def lines_of(words: list[str], root: Path, **options: bool | int) -> list[str]:
    found: list[str] = []
    show_logs(words, str(root), found.append, **options)  # type: ignore[arg-type]
    return found


def test_logs_are_merged_by_time_and_readable(folder: Path) -> None:
    assert lines_of(["demo"], folder.parent) == [
        f"{'-' * 19}  engine    no time yet",
        "2026-11-30 06:37:29  queue     * Ready",
        "2026-11-30 06:37:30  launcher  [   0.0 s] run demo: new",
        '2026-11-30 06:37:31  trainer   step 0  (reward_mean=0.1235 seconds={"wait": 1.235})',
        "2026-11-30 06:37:35  engine    up",
        "2026-11-30 06:37:36  engine    bad\n" + "\n".join(
            " " * 31 + line for line in ("Traceback (most recent call last):", "  File x", "KeyError: 'k'")
        ),
        "2026-11-30 06:37:41  trainer   error: it failed\n" + "\n".join(
            " " * 31 + line for line in ("Traceback ...", "ValueError: x", '{"cut')
        ),
        "2026-11-30 06:37:50  launcher  it ended",
    ]  # fmt: skip


def test_the_last_entries_of_a_service_and_only_faults(folder: Path) -> None:
    assert lines_of(["demo", "launcher"], folder.parent, num_lines=1) == [
        "(1 earlier entries: --lines 0 shows all)",
        "2026-11-30 06:37:50  launcher  it ended",
    ]
    faults = lines_of(["demo"], folder.parent, errors=True)
    assert [line.splitlines()[0][21:] for line in faults] == [
        "engine    bad",
        "trainer   error: it failed",
    ]
    assert lines_of(["trainer"], folder.parent, num_lines=1)[1].startswith("2026-11-30 06:37:41  trainer")


def test_engines_of_one_run_are_told_apart(folder: Path) -> None:
    write_log(folder, "engine-rollout-vm-2-bb", "[2026-11-30 06:37:33] up too")
    found = lines_of(["demo", "engine"], folder.parent)
    assert {line.split()[2] for line in found[1:]} == {"engine-rollout-vm-1-aa", "engine-rollout-vm-2-bb"}


def test_without_a_name_it_is_the_run_that_logged_last(folder: Path) -> None:
    other = make_run(folder.parent / "other", [0.5])
    write_log(other, "trainer", event(1, "of the other"))
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
    assert lines_of([], folder.parent)[-1].endswith("it ended")
    os.utime(other / "logs" / "trainer.log")
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    assert lines_of([], folder.parent) == ["2026-11-30 06:37:01  trainer  of the other"]


def test_a_wrong_name_is_answered_with_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["logs", "demo", "trainr", "--root", str(folder.parent)]) == 2
    error = capsys.readouterr().err
    assert "expected one of engine, engine-rollout-vm-1-aa, launcher, queue, trainer; did you mean 'trainer'?" in error
    with pytest.raises(ConfigError, match="the nearest is 'demo'"):
        lines_of(["demu"], folder.parent)
    with pytest.raises(ConfigError, match=r"saw 'c'; expected penstock logs \[RUN\] \[SERVICE\]"):
        lines_of(["a", "b", "c"], folder.parent)
    with pytest.raises(ConfigError, match="there is no run in"):
        lines_of([], folder / "logs")


def test_following_shows_new_entries_and_logs_until_the_run_ends(folder: Path) -> None:
    write_processes(folder, run="demo")
    found: list[str] = []
    seen = {text: threading.Event() for text in ("it ended", "later", "of a new log")}

    def write(line: str) -> None:
        found.append(line)
        for text, event_seen in seen.items():
            if text in line:
                event_seen.set()

    following = threading.Thread(target=show_logs, args=(["demo"], str(folder.parent), write), kwargs={"follow": True})
    following.start()
    assert seen["it ended"].wait(ANSWER_SECONDS)
    write_log(folder, "launcher", "2026-11-30T06:37:51Z later")
    assert seen["later"].wait(ANSWER_SECONDS)
    write_log(folder, "rollout", event(52, "of a new log"))
    assert seen["of a new log"].wait(ANSWER_SECONDS)
    write_log(folder, "launcher", "2026-11-30T06:37:53Z the last words")
    (folder / "processes.json").unlink()
    following.join(ANSWER_SECONDS)
    assert not following.is_alive()
    assert found[-1] == "2026-11-30 06:37:53  launcher  the last words"
    assert len(found) == len(set(found))

"""A disk that is full while a run starts, runs or ends: no traceback, and nothing is killed for it."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.launch.launch_setup import LaunchSetup, all_up, until, wait_for_text
from tests.integration.launch.user_commands import END_SECONDS, UserCommands
from tests.patience import START_SECONDS
from tests.small_disk import fill, make_room, small_disk

pytestmark = pytest.mark.redis

FULL_SECONDS = 8.0  # whether the trainer dies or waits for the queue, which depends on what it did last
WORDS = ("launch", "local", "--config", "config.yaml", "--run.max_steps", "1000")
NO_ROOM = "(No space left on device)"


class Launch:
    """A launch on a small disk of its own, and all that it shows."""

    def __init__(self, setup: LaunchSetup, disk: Path) -> None:
        self.disk = disk
        self.setup = setup
        setup.run_folder = disk / "runs" / "t"
        self._shown = setup.folder / "shown.txt"  # on another disk
        with self._shown.open("w") as file:
            words = (*WORDS, "--run.root", str(disk / "runs"))
            self.process = setup.command(*words, stdout=file.fileno(), stderr=subprocess.STDOUT)

    @property
    def shown(self) -> str:
        return self._shown.read_text()

    def fill_while_it_runs(self) -> None:
        """Fill the disk, and kill a service: its next process has to be recorded."""
        all_up(self.setup)
        for service in ("trainer", "reward"):
            wait_for_text(self.setup, f"{service}: ready")
        fill(self.disk)
        self.setup.identity("reward").send(signal.SIGKILL)
        until(lambda: f"processes.json cannot be written {NO_ROOM}" in self.shown)
        until(lambda: f"launcher.log cannot be written {NO_ROOM}" in self.shown)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def setup(tmp_path: Path, disk: Path) -> Iterator[LaunchSetup]:
    setup = LaunchSetup(tmp_path)
    yield setup
    setup.end()


def test_a_run_goes_on_after_its_disk_was_full(setup: LaunchSetup, disk: Path) -> None:
    launch = Launch(setup, disk)
    launch.fill_while_it_runs()
    make_room(disk)
    until(lambda: launch.shown.count("reward: ready") >= 2)  # the log may have found no room for the line
    setup.finish()
    assert launch.process.wait(START_SECONDS) == 0, launch.shown
    assert "Traceback" not in launch.shown
    restarts = setup.summary()["restarts"]
    assert restarts == {"queue": 0, "rollout": 0, "trainer": 0, "reward": 1}


def test_a_run_on_a_full_disk_ends_in_order_and_says_why(setup: LaunchSetup, disk: Path) -> None:
    launch = Launch(setup, disk)
    launch.fill_while_it_runs()
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.wait(START_SECONDS) == 128 + signal.SIGINT, launch.shown
    assert "Traceback" not in launch.shown
    assert "is killed" not in launch.shown
    assert "Ended with exit code 130: stopped by Ctrl-C" in launch.shown
    assert f"the disk of {setup.run_folder} has 0.0 MB left: make room before the next launch" in launch.shown


def test_a_launch_on_a_full_disk_ends_with_one_line(setup: LaunchSetup, disk: Path) -> None:
    (disk / "runs" / "t").mkdir(parents=True)
    fill(disk)
    launch = Launch(setup, disk)
    assert launch.process.wait(START_SECONDS) == 1
    assert "Traceback" not in launch.shown
    assert "cannot be written (No space left on device)" in launch.shown.splitlines()[-1]


@pytest.mark.slow
def test_a_run_whose_disk_was_full_trains_each_ticket_once(tmp_path: Path, tiny_model: Path, disk: Path) -> None:
    """The real services: the trainer can write no checkpoint, and the queue refuses what the others hand over."""
    user = UserCommands(tmp_path, tiny_model)
    user.use_pure_engine()
    user.document["run"]["root"] = str(disk / "runs")
    user.document["total_train_epochs"] = 40
    user.document["checkpoint"] = {"every_steps": 1, "keep": 2}
    folder = disk / "runs" / user.document["run"]["name"]
    try:
        process = user.start("penstock_launch", "launch", "local")
        until(lambda: (folder / "steps.jsonl").exists() and (folder / "steps.jsonl").read_text().count("\n") >= 3)
        fill(disk)
        time.sleep(FULL_SECONDS)
        make_room(disk)
        output, _ = process.communicate(timeout=END_SECONDS)
    finally:
        user.end()
    assert process.returncode == 0, output
    assert "Traceback" not in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 40
    assert summary["tickets"] == {"issued": 80, "trained": 80, "dropped": {}, "outstanding": 0}

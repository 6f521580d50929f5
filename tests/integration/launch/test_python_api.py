"""`import penstock` as its user sees it: the real launcher and queue, with services that only pretend to work."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import penstock
from penstock.runtime.process import ProcessIdentity
from tests.integration.launch.launch_setup import LaunchSetup, until
from tests.patience import START_SECONDS

pytestmark = pytest.mark.redis

LAUNCHES = """
import sys, time
import penstock
run = penstock.launch(penstock.load("config.yaml", {"run.max_steps": 1000}))
print(run.state().launcher.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LaunchSetup]:
    setup = LaunchSetup(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "modules"), *filter(None, sys.path)]))
    yield setup
    for run in penstock.runs():
        launcher = run.state().launcher
        if launcher is not None:
            launcher.send(signal.SIGKILL)
    setup.end()


def test_a_run_is_launched_followed_and_read(setup: LaunchSetup) -> None:
    """The launch after it fails with its own words, and the earlier records are not taken for its own."""
    secret = "a-token-that-nobody-sees"
    run = penstock.launch(penstock.load("config.yaml", {"token": secret, "run.seed": 7}))
    assert run.state().name == "running"
    steps = []
    for step in run.follow():
        steps.append((step["step"], step["reward_mean"]))
        if len(steps) == 1:
            with pytest.raises(penstock.ConfigError, match=r"run\.name: 't' is running already .*open_run"):
                penstock.launch(penstock.load("config.yaml"))
    assert steps == [(step, 0.5) for step in range(3)]
    assert (run.state().name, run.state().exit_code) == ("finished", 0)
    evaluations: list[dict[str, Any]] = []
    assert run.wait(on_evaluation=evaluations.append) == run.stop() == run.state()
    assert [line["accuracy"] for line in evaluations] == [0.25]
    assert list(run.steps()["seconds/step"]) == [0.5, 0.5, 0.5]
    assert list(run.evaluations()["accuracy"]) == [0.25]
    assert len(run.completions()) == 0
    assert (run.config()["run"]["seed"], run.summary()["exit"]["code"]) == (7, 0)
    assert "Finished: 3 steps" in run.output()
    assert stat.S_IMODE(Path("runs/t.launch.log").stat().st_mode) == 0o600
    assert not [path for path in Path("runs").rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]

    failing = penstock.launch(penstock.load("config.yaml", {"run.existing": "refuse"}))
    lines = failing.follow()
    with pytest.raises(
        penstock.RunFailedError, match=r"failed with exit code 2: .*\npenstock: config: run\.existing is refuse and "
    ) as raised:
        next(lines)  # none of the earlier launch
    assert raised.value.state.exit_code == 2
    assert "Finished" not in failing.output()


def test_a_run_goes_on_without_the_python_that_launched_it(setup: LaunchSetup) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as python:
        assert python.stdout is not None
        launcher = ProcessIdentity.of(int(python.stdout.readline()))
        assert launcher is not None
        until(lambda: (setup.run_folder / "steps.jsonl").exists())
        os.killpg(python.pid, signal.SIGKILL)  # as a notebook's kernel is ended
    run = penstock.open_run("t")
    assert run.state().launcher == launcher
    followed = run.follow()
    assert [next(followed)["step"] for _ in range(3)] == [0, 1, 2]
    processes = [each.identity for each in setup.processes()]
    stopping, seen = Thread(target=run.stop), set[str]()
    stopping.start()
    while stopping.is_alive():
        seen.add(penstock.open_run("t").state().name)
        time.sleep(0.001)
    assert seen <= {"running", "stopped"}  # the end is there before the record of the processes goes
    assert str(run.state()) == "stopped by SIGTERM"
    assert not [identity for identity in processes if identity.alive]
    assert all(line["reward_mean"] == 0.5 for line in followed)  # and it ends


def test_a_python_that_ends_mentions_the_run_that_goes_on(setup: LaunchSetup) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LAUNCHES], input="", capture_output=True, text=True, timeout=START_SECONDS
    )
    launcher = ProcessIdentity.of(int(ended.stdout))
    assert launcher is not None
    assert ended.stderr == (
        f"penstock: t goes on (its launcher has pid {launcher.pid}); "
        f"penstock.open_run('{setup.run_folder}').stop() ends it\n"
    )
    launcher.send(signal.SIGTERM)
    until(lambda: not launcher.alive)


def test_a_run_that_is_stopped_before_it_has_begun_is_stopped(setup: LaunchSetup) -> None:
    with penstock.launch(penstock.load("config.yaml")) as run:
        pass
    assert (run.state().name, run.state().exit_code) == ("stopped", 128 + signal.SIGTERM)
    assert run.wait(0) == run.state()
    assert list(run.follow()) == []

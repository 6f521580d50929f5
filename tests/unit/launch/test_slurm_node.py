"""Both ends of a step of the job: the launcher's, and the node's, which runs the service."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.errors import ConfigError
from penstock.runtime.process import ProcessIdentity
from penstock_launch.slurm.attempt import Attempt, Whereabouts
from penstock_launch.slurm.steps import ABOUT_THE_END, Step
from penstock_launch.supervise.child import Child, ChildState
from penstock_launch.supervise.restarts import RestartPolicy
from tests.patience import START_SECONDS

NODE = (sys.executable, "-m", "penstock_launch.slurm.node")
WAITS = "import time; print('up', flush=True); time.sleep(600)"


def step(folder: Path, script: str, *options: str) -> Step:
    """A service that the node's end starts, without srun between the two ends."""
    (folder / "slurm").mkdir()
    (folder / "config.yaml").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return Step(
        "reward",
        (*NODE, "--run", str(folder), *options),
        (sys.executable, "-S", "-c", script),
        environment,
        folder=folder,
        log_path=folder / "reward.log",
        hint="starts",
    )


def start(service: Step) -> Child:
    child = Child(service, RestartPolicy())
    child.start(lambda: None)
    return child


def wait(child: Child, timeout_seconds: float = START_SECONDS) -> int:
    deadline = time.monotonic() + timeout_seconds
    while (exit_code := child.poll()) is None:
        assert time.monotonic() < deadline, "it did not end in time"
        time.sleep(0.02)
    return exit_code


def started(child: Child) -> ProcessIdentity:
    """The service's process, once it is up and its node has written where it is."""
    deadline = time.monotonic() + START_SECONDS
    while child.pid is None or "up" not in child.log_path.read_text():
        assert time.monotonic() < deadline, "it did not start in time"
        time.sleep(0.02)
    assert child.host == socket.gethostname()
    identity = ProcessIdentity.of(child.pid)
    assert identity is not None
    return identity


def test_a_service_is_asked_to_end_by_the_end_of_its_input(tmp_path: Path) -> None:
    child = start(step(tmp_path, f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); {WAITS}"))
    identity = started(child)
    child.send(signal.SIGTERM)
    assert wait(child) == 3
    assert child.state is ChildState.ENDED
    assert not identity.alive
    assert list((tmp_path / "slurm").iterdir()) == []  # the files of an attempt are deleted with it


def test_a_service_ends_when_what_started_it_is_killed(tmp_path: Path) -> None:
    child = start(step(tmp_path, WAITS))
    identity = started(child)
    child.kill_session()
    deadline = time.monotonic() + START_SECONDS
    while identity.alive:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_service_is_told_by_its_signal(tmp_path: Path) -> None:
    child = start(step(tmp_path, "import os; os.kill(os.getpid(), 9)"))
    assert wait(child) == -signal.SIGKILL
    assert child.detail == "killed by SIGKILL"


def test_what_slurm_adds_is_no_word_of_the_service(tmp_path: Path) -> None:
    last = "reward: config: no such function"
    added = (
        "srun: error: cpu1: task 0: Exited with exit code 2",
        "srun: error: gpu[1-2]: tasks 0-1: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=6.0",
        "slurmstepd: error: *** STEP 3.2 ON gpu1 CANCELLED AT 2026-11-24T15:14:31 ***",
    )
    script = f"import sys; print({chr(10).join((last, *added))!r}); sys.exit(2)"
    child = start(step(tmp_path, script))
    assert wait(child) == 2
    assert child.error_lines() == [last]
    unable = "srun: error: Unable to create step for job 7: Invalid generic resource (gres) specification"
    assert ABOUT_THE_END.match(unable) is None


def test_of_ranks_on_several_nodes_the_one_to_blame_gives_the_exit_code(tmp_path: Path) -> None:
    script = "import sys, pathlib; pathlib.Path(sys.argv[sys.argv.index('--blame') + 1]).write_text('5'); sys.exit(7)"
    child = start(step(tmp_path, script, "--meet", "127.0.0.1", "--num-hosts", "2"))
    assert wait(child) == 5


def test_the_first_node_tells_the_port_and_the_others_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    attempt = Attempt(tmp_path, "trainer-1")
    with pytest.raises(
        ConfigError, match=r"run\.root: .*trainer-1\.port .*expected a file system that all nodes share"
    ):
        attempt.wait_for_port(0.1)
    attempt.write_port(4711)
    assert Attempt(tmp_path, "trainer-1").wait_for_port(START_SECONDS) == 4711


def test_a_folder_that_a_node_does_not_see_is_named_with_its_key(tmp_path: Path) -> None:
    done = subprocess.run(
        [*NODE, "--run", str(tmp_path / "elsewhere"), "--attempt", "reward-1", "--", "true"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "SLURMD_NODENAME": "gpu17"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode == 2
    assert "reward: config: run.root:" in done.stderr
    assert "is not visible on node gpu17; expected a file system that all nodes share" in done.stderr


def test_whereabouts_are_unknown_until_they_are_told(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    attempt = Attempt(tmp_path, "rollout-1")
    assert attempt.whereabouts() is None
    attempt.write_whereabouts(Whereabouts("gpu1", "host", 7))
    assert attempt.whereabouts() == Whereabouts("gpu1", "host", 7)

"""What a launch meets on its host: output that nobody reads, hang-ups, file systems without locks."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.launch.launch_setup import LaunchSetup, all_up, until, wait_for_text
from tests.integration.launch.user_commands import said
from tests.integration.launch.without_flock import UNSUPPORTED_EXIT_CODE
from tests.patience import START_SECONDS

pytestmark = pytest.mark.redis

WITHOUT_FLOCK = Path(__file__).with_name("without_flock.py")
UNREAD = 128 + signal.SIGPIPE
COMMANDS = [
    ("--help",),
    ("config", "--config", "config.yaml"),
    ("launch", "slurm", "--render-only", "--config", "config.yaml"),
]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[LaunchSetup]:
    setup = LaunchSetup(tmp_path)
    yield setup
    setup.end()


def closed_pipe() -> int:
    """As `| head` leaves it."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_whose_output_nobody_reads_ends_without_a_traceback(
    setup: LaunchSetup, words: tuple[str, ...]
) -> None:
    writer = closed_pipe()
    process = setup.command(*words, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, errors = process.communicate(timeout=START_SECONDS)
    assert (process.returncode, errors) == (UNREAD, "")


@pytest.mark.parametrize("words", COMMANDS)
def test_output_that_finds_no_room_is_named(setup: LaunchSetup, words: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        process = setup.command(*words, stdout=full.fileno(), stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 1
    assert errors == "penstock: error: standard output cannot be written (No space left on device)\n"


def test_much_output_that_finds_no_room_is_named(setup: LaunchSetup) -> None:
    """More than Python holds back: the write itself fails."""
    (setup.folder / "long.yaml").write_text(f"data: {{system_prompt: {'x' * 100_000}}}\n")
    with Path("/dev/full").open("w") as full:
        words = ("config", "--config", "config.yaml", "--config", "long.yaml")
        process = setup.command(*words, stdout=full.fileno(), stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 1
    assert errors == "penstock: error: standard output or a file cannot be written (No space left on device)\n"


def test_an_error_that_finds_no_room_keeps_its_exit_code(setup: LaunchSetup) -> None:
    with Path("/dev/full").open("w") as full:
        process = setup.command("config", "--config", "nowhere.yaml", stderr=full.fileno())
        assert process.wait(START_SECONDS) == 2
        search = os.pathsep.join(filter(None, sys.path))
        service = subprocess.run(
            [sys.executable, "-m", "penstock_reward", "--config", str(setup.folder / "nowhere.yaml")],
            env={**os.environ, "PYTHONPATH": search},
            stderr=full,
            timeout=START_SECONDS,
            check=False,
        )
    assert service.returncode == 2


def test_a_launch_whose_output_nobody_reads_goes_on_to_its_end(setup: LaunchSetup) -> None:
    """`penstock launch local ... 2>&1 | head -3`: the run's own log and summary hold what happens."""
    process = setup.launch("--run.max_steps", "1000")
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()
    all_up(setup)
    wait_for_text(setup, "step 2/1000")
    setup.finish()
    assert process.wait(START_SECONDS) == 0
    assert setup.summary()["exit"] == {"code": 0, "reason": "the trainer has finished", "lines": []}
    assert not (setup.run_folder / "processes.json").exists()


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nohup_protects_a_launch_and_all_its_children(setup: LaunchSetup, num_ranks: int) -> None:
    words = ("launch", "local", "--config", "config.yaml", "--run.max_steps", "1000")
    process = setup.command(*words, "--trainer.num_ranks", str(num_ranks), before=("nohup",))
    wait_for_text(setup, "trainer: ready")
    known = all_up(setup)
    for each in known:
        each.identity.send(signal.SIGHUP)
    shown = (setup.run_folder / "logs" / "launcher.log").read_text().count("step ")
    wait_for_text(setup, "step ", times=shown + 2)
    assert all(each.identity.alive for each in known)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "died" not in output
    assert "SIGHUP" not in output


def test_a_background_job_of_a_script_ignores_ctrl_c(setup: LaunchSetup) -> None:
    """A shell without job control starts it with SIGINT ignored, in the script's own process group."""
    before = ("env", "--ignore-signal=INT")
    process = setup.command("launch", "local", "--config", "config.yaml", "--run.max_steps", "1000", before=before)
    wait_for_text(setup, "trainer: ready")
    process.send_signal(signal.SIGINT)
    shown = (setup.run_folder / "logs" / "launcher.log").read_text().count("step ")
    wait_for_text(setup, "step ", times=shown + 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Ctrl-C" not in output


def test_a_closed_terminal_ends_a_launch_in_order(setup: LaunchSetup) -> None:
    leader, terminal = os.openpty()
    process = setup.command(
        "launch", "local", "--config", "config.yaml", "--run.max_steps", "1000", stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    try:
        known = all_up(setup)
        wait_for_text(setup, "trainer: ready")
    finally:
        os.close(leader)  # as if its window were closed: output fails from now on
    process.send_signal(signal.SIGHUP)
    assert process.wait(START_SECONDS) == 128 + signal.SIGHUP
    assert setup.summary()["exit"] == {"code": 129, "reason": "stopped by SIGHUP", "lines": []}
    until(lambda: not any(each.identity.alive for each in known))
    assert "killed" not in (setup.run_folder / "logs" / "launcher.log").read_text()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(setup: LaunchSetup, number: int) -> None:
    before = (sys.executable, str(WITHOUT_FLOCK), str(number))
    process = setup.command("launch", "local", "--config", "config.yaml", before=before)
    output, _ = process.communicate(timeout=START_SECONDS)
    if process.returncode == UNSUPPORTED_EXIT_CODE:
        pytest.skip(f"no filter of system calls here: {output}")
    assert process.returncode == 2
    assert f"config: run.root: files in runs/t cannot be locked (flock: {os.strerror(number)})" in output
    assert len(said(output).splitlines()) == 1, output


def test_a_local_folder_without_locks_is_named(tmp_path: Path) -> None:
    claim = "from penstock.weights.local_folder import LocalFolder; import sys; LocalFolder('x', 1, sys.argv[1])"
    done = subprocess.run(
        [sys.executable, str(WITHOUT_FLOCK), str(errno.ENOLCK), sys.executable, "-c", claim, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    if done.returncode == UNSUPPORTED_EXIT_CODE:
        pytest.skip(f"no filter of system calls here: {done.stderr}")
    assert "ConfigError: weights.local_folder: no folder can be made" in done.stderr
    assert "on a file system with locks (flock)" in done.stderr

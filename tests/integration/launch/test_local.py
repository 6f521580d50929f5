"""`penstock launch local` as its user sees it: the real command and queue, with services that only pretend to work."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import yaml

from penstock.runtime.process import ProcessIdentity, descendants
from penstock_launch.run_folder import QueueAddress
from tests.integration.launch.launch_setup import LaunchSetup, all_up, until, wait_for_text
from tests.patience import START_SECONDS

pytestmark = pytest.mark.redis


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[LaunchSetup]:
    setup = LaunchSetup(tmp_path)
    yield setup
    setup.end()


def test_a_run_from_start_to_summary(setup: LaunchSetup) -> None:
    process = setup.launch()
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, output
    for text in ("queue: Valkey", "trainer: starting: loads the model", "trainer: ready after", "step 1/3", "1+1= ->"):
        assert text in output.replace("Redis", "Valkey")
    assert re.findall(r"^\[ *[\d.]+ s\] +step (\d)/3 ", output, re.MULTILINE) == ["1", "2", "3"]
    assert max(map(len, output[: output.index("Completions before")].splitlines())) <= 120
    for text in ("trainer: ending: writing a checkpoint", "rollout, reward: ended after", "queue: ended after"):
        assert text in output
    assert re.search(r"Finished: 3 steps in 0:0\d of training, after", output)
    assert "  train longer  " in output
    assert "launch local --config config.yaml --run.max_steps 6\n" in output
    assert "penstock: " not in output  # such as a warning that the hold could not be given up
    summary = setup.summary()
    assert summary["exit"] == {"code": 0, "reason": "the trainer has finished", "lines": []}
    assert summary["restarts"] == {"queue": 0, "rollout": 0, "trainer": 0, "reward": 0}
    assert isinstance(summary["seconds_setup"], float)
    peaks = summary["peak_rss_bytes"]
    assert isinstance(peaks, dict)
    assert {"queue", "rollout", "reward", "trainer", "launcher", "total"} <= peaks.keys()
    logs = sorted(path.name for path in (setup.run_folder / "logs").iterdir())
    assert logs == ["launcher.log", "queue.log", "reward.log", "rollout.log", "trainer.log"]
    assert not (setup.run_folder / "processes.json").exists()
    assert not (setup.run_folder / "queue.json").exists()


def test_a_summary_that_cannot_be_written_is_no_success(setup: LaunchSetup) -> None:
    (setup.run_folder / "summary.json").mkdir(parents=True)
    process = setup.launch()
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 1, output
    assert "Finished: 3 steps" in output
    assert output.splitlines()[-1].startswith("penstock: error: runs/t/summary.json (")
    assert "Traceback" not in output


def test_killed_services_come_back_and_the_run_ends_right(setup: LaunchSetup) -> None:
    process = setup.launch("--run.max_steps", "1000")
    wait_for_text(setup, "trainer: started")
    setup.identity("trainer")
    for service in ("reward", "queue"):
        kill_once(setup, service)
    setup.finish()
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, output
    restarts = setup.summary()["restarts"]
    assert isinstance(restarts, dict)
    for service in ("reward", "queue"):
        assert f"{service}: died (killed by SIGKILL)" in output
        assert restarts[service] == 1


def kill_once(setup: LaunchSetup, service: str) -> None:
    """Kill a service, and wait until it has come back."""
    first = setup.identity(service)
    first.send(signal.SIGKILL)
    wait_for_text(setup, f"{service}: died (killed by SIGKILL)")
    until(lambda: setup.identity(service) != first)


@pytest.mark.slow
def test_a_run_of_episodes_has_agent_services(setup: LaunchSetup) -> None:
    words = ("--agent.command", "[my-agent]", "--agent.num_services", "2", "--run.max_steps", "1000")
    process = setup.launch(*words)
    wait_for_text(setup, "agent-0: ready after")
    wait_for_text(setup, "agent-1: ready after")
    wait_for_text(setup, "trainer: ready after")
    log = (setup.run_folder / "logs" / "launcher.log").read_text()
    assert "agent-0: starting: loads the tokenizer and the environment" in log
    first = setup.identity("agent-1")
    first.send(signal.SIGKILL)
    wait_for_text(setup, "agent-1: died (killed by SIGKILL)")
    until(lambda: setup.identity("agent-1") != first)
    status = setup.command("status", "--config", "config.yaml", *words[:2], "--agent.num_services", "5")
    output, _ = status.communicate(timeout=START_SECONDS)
    assert status.returncode == 0, output
    assert re.search(r"^  agent\d+: .*, http://127\.0\.0\.1:\d+$", output, re.MULTILINE)
    # Three may have a record: the one that was killed has it until its heartbeat is missed.
    assert re.search(r"^  agent: \d of 5 are up; runs/t/logs says what became of the rest$", output, re.MULTILINE)
    setup.finish()
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, output
    assert setup.summary()["restarts"] == dict.fromkeys(("queue", "rollout", "trainer", "agent-0", "reward"), 0) | {
        "agent-1": 1
    }


@pytest.mark.slow
def test_a_killed_rank_ends_all_ranks_and_the_trainer_comes_back(setup: LaunchSetup) -> None:
    process = setup.launch("--trainer.num_ranks", "2", "--run.max_steps", "1000")
    for rank in (0, 1):
        wait_for_text(setup, "trainer: ready", times=rank + 1)
        before = ranks_of(setup.identity("trainer"))
        assert before.keys() == {0, 1}
        before[rank].send(signal.SIGKILL)
        wait_for_text(setup, f"trainer: rank {rank} of 2 ended: killed by signal 9; restart in")
        wait_for_text(setup, "trainer: ready", times=rank + 2)
        assert not any(identity.alive for identity in before.values())
    setup.finish()
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, output
    for rank in (0, 1):
        assert f"trainer: rank {rank} of 2 ended: killed by signal 9; restart in" in output
    restarts = setup.summary()["restarts"]
    assert isinstance(restarts, dict)
    assert restarts["trainer"] == 2


@pytest.mark.slow
def test_ranks_end_in_order_and_their_errors_keep_their_exit_code(setup: LaunchSetup) -> None:
    process = setup.launch("--trainer.num_ranks", "2", "--run.max_steps", "1000")
    wait_for_text(setup, "trainer: ready")
    ranks = ranks_of(setup.identity("trainer"))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 130, output
    assert "killed" not in output
    assert not any(identity.alive for identity in ranks.values())
    process = setup.launch("--trainer.num_ranks", "2", "--actor.path", "spoilt")
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2, output
    assert "trainer: config: actor.path: 'spoilt' cannot be used; expected a Hugging Face folder" in output


def ranks_of(trainer: ProcessIdentity) -> dict[int, ProcessIdentity]:
    """The processes that torchrun has started, by rank."""
    found = {}
    for identity in descendants(trainer.pid):
        rank = psutil.Process(identity.pid).environ().get("RANK")
        if rank is not None:
            found[int(rank)] = identity
    return found


def test_kill_9_of_the_launcher_leaves_no_child_and_the_next_launch_ends_orphans_first(setup: LaunchSetup) -> None:
    process = setup.launch("--run.max_steps", "1000")
    known = all_up(setup)
    process.kill()
    until(lambda: not any(each.identity.alive for each in known))
    # Not tied to the launcher: a process that the killed launch had recorded, and that still runs.
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as orphan:
        identity = ProcessIdentity.of(orphan.pid)
        assert identity is not None
        path = setup.run_folder / "processes.json"
        document = json.loads(path.read_text())
        document["processes"].append({"service": "rollout", "pid": orphan.pid, "started": identity.started})
        path.write_text(json.dumps(document))
        again = setup.launch()
        output, _ = again.communicate(timeout=START_SECONDS)
        assert again.returncode == 0, output
        assert f"ended a process of an earlier launch: rollout (pid {orphan.pid})" in output
        assert "run t: continues" in output
        assert not identity.alive


def test_a_configuration_error_of_a_service_ends_everything_with_its_line(setup: LaunchSetup) -> None:
    process = setup.launch("--actor.path", "spoilt")
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2, output
    assert "trainer: config: actor.path: 'spoilt' cannot be used; expected a Hugging Face folder" in output
    assert "Traceback" not in output


def test_ctrl_c_ends_everything_in_order(setup: LaunchSetup) -> None:
    process = setup.launch("--run.max_steps", "1000")
    known = all_up(setup)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 130, output
    assert "killed" not in output
    assert "Traceback" not in output
    assert not any(each.identity.alive for each in known)
    assert setup.summary()["exit"] == {"code": 130, "reason": "stopped by Ctrl-C", "lines": []}


def test_cancel_ends_a_run_in_order_and_says_where_there_is_none(setup: LaunchSetup) -> None:
    process = setup.launch("--run.max_steps", "1000")
    known = all_up(setup)
    wait_for_text(setup, "step 1/1000")
    output, _ = setup.command("cancel", "--config", "config.yaml").communicate(timeout=START_SECONDS)
    assert "run t has ended" in output
    process.communicate(timeout=START_SECONDS)
    assert process.returncode == 143
    assert not any(each.identity.alive for each in known)
    assert setup.summary()["exit"] == {"code": 143, "reason": "stopped by SIGTERM", "lines": []}
    ended = setup.command("status", "--config", "config.yaml")
    output, _ = ended.communicate(timeout=START_SECONDS)
    assert ended.returncode == 0
    assert "run t\n  stopped by SIGTERM at step " in output
    assert "not_running" not in output
    assert "\n  go on" in output
    again = setup.command("cancel", "--config", "config.yaml")
    output, _ = again.communicate(timeout=START_SECONDS)
    assert again.returncode == 1
    assert "run 't' is not running: no live launcher of this host and no Slurm job in runs/t" in output


def test_status_and_a_second_launch_beside_a_run(setup: LaunchSetup) -> None:
    before = setup.command("status", "--config", "config.yaml")
    output, _ = before.communicate(timeout=START_SECONDS)
    assert before.returncode == 1
    assert "run 't' is not running" in output
    process = setup.launch("--run.max_steps", "1000")
    all_up(setup)
    wait_for_text(setup, "step 1/1000")
    status = setup.command("status", "--config", "config.yaml")
    output, _ = status.communicate(timeout=START_SECONDS)
    assert status.returncode == 0, output
    assert "phase training" in output
    assert "/1000" in output
    assert "are up" not in output
    status = setup.command("status", "--config", "config.yaml", "--rollout.num_servers", "2")
    output, _ = status.communicate(timeout=START_SECONDS)
    assert "rollout: 1 of 2 are up; runs/t/logs says what became of the rest" in output
    second = setup.launch()
    output, _ = second.communicate(timeout=START_SECONDS)
    assert second.returncode == 2
    assert f"'t' is running already (its launcher has pid {process.pid})" in output
    address = msgspec.json.decode((setup.run_folder / "queue.json").read_bytes(), type=QueueAddress)
    assert address.password not in (setup.run_folder / "config.yaml").read_text()
    assert (setup.run_folder / "queue.json").stat().st_mode & 0o077 == 0
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=START_SECONDS)
    assert process.returncode == 143


def test_an_unreachable_redis_is_named(setup: LaunchSetup) -> None:
    process = setup.launch("--redis.url", "redis://127.0.0.1:1/0", "--redis.timeout_seconds", "1")
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 4, output
    assert "redis.url redis://127.0.0.1:1/0" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("config", "--config", "nowhere.yaml"), "--config nowhere.yaml: cannot be read"),
        (("launch", "local", "--config", "config.yaml", "--actor.group_siz", "8"), "did you mean actor.group_size?"),
        (("launch", "local"), "no configuration file"),
    ],
)
def test_a_wrong_command_line_gives_one_clear_line(setup: LaunchSetup, words: tuple[str, ...], text: str) -> None:
    process = setup.command(*words)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2, output
    assert text in output
    assert len(output.splitlines()) == 1


def test_config_prints_the_tree_with_secrets_masked(setup: LaunchSetup) -> None:
    process = setup.command("config", "--config", "config.yaml", "--actor.group_size", "4", "--token", "tok3n")
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, output
    tree = yaml.safe_load(output)
    assert tree["actor"]["group_size"] == 4
    assert tree["token"] == "**********"
    assert tree["total_train_epochs"] == 1

"""Launches and services of one name on one queue: the live run keeps its work, and a stranger is refused by name."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.broker import Queue, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config
from tests.integration.launch.launch_setup import LaunchSetup, until, wait_for_text
from tests.integration.launch.user_commands import (
    UserCommands,
    assert_launch_ends,
    assert_one_line,
    ended,
    eventually,
    said,
    trained,
)
from tests.patience import START_SECONDS
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving

pytestmark = [pytest.mark.redis, pytest.mark.slow]

CONFIG_EXIT = 2
REWARDS = """
import os, time

def spread(prompt, completion, answer, metadata):
    while os.path.exists("hold"):
        time.sleep(0.01)
    return float(len(set(completion)) % 3)

def length(prompt, completion, answer, metadata):
    return 100.0 + len(completion)
"""


def end(started: "list[subprocess.Popen[str]]") -> None:
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def scores_of(run_folder: Path) -> list[float]:
    """All that was trained on."""
    packs = [msgspec.msgpack.decode(path.read_bytes()) for path in sorted((run_folder / "steps").glob("*.pack"))]
    return [score["value"] for pack in packs for scored in pack["groups"] for score in scored["scores"]]


async def refused(setup: UserCommands, module: str, *words: str) -> tuple[int, str]:
    """Exit code and output of a command that must end while the run goes on."""
    process = setup.start(module, *words)
    async with asyncio.timeout(START_SECONDS):
        while process.poll() is None:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert process.stdout is not None
    return process.returncode, process.stdout.read()


async def test_no_launch_and_no_service_of_the_name_touches_a_live_run(
    setup: UserCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.rollout.fake_model.VOCABULARY", 43)  # that of the tiny model
    (setup.folder / "own.py").write_text(REWARDS)
    setup.document["reward"] = {"functions": {"own:spread": 1.0}, "timeout_seconds": START_SECONDS}
    setup.document["total_train_epochs"] = 12
    name = setup.document["run"]["name"]
    async with serving(FakeSGLang()) as url:
        setup.document["rollout"]["engine"] = {"url": url}
        reward, _ = (setup.start(module) for module in ("penstock_reward", "penstock_rollout"))
        trainer = setup.start("penstock_trainer")
        queue = await connect(Config.model_validate(setup.document))
        try:
            await eventually(lambda: trained(queue), 1, trainer)
            (setup.folder / "hold").touch()
            before = await kept(queue)
            await strangers_are_refused(setup, name)
            assert await kept(queue) >= before
            assert len(await queue.services()) == 3
            (setup.folder / "hold").unlink()
            assert await ended(trainer) == 0, trainer.stdout and trainer.stdout.read()
            assert reward.poll() is None
            assert await trained(queue) == 24
            scores = scores_of(setup.folder / "runs" / name)
            assert len(scores) == 48
            assert set(scores) <= {0.0, 1.0, 2.0}
        finally:
            await queue.close()
    setup.document["run"] |= {"root": "elsewhere", "existing": "resume"}
    result = await refused(setup, "penstock_trainer")
    assert_one_line(result, CONFIG_EXIT, "config: run.root: the folder of run", "24 trained", f"/runs/{name}")
    result = await refused(setup, "penstock_launch", "launch", "local")
    assert_launch_ends(result, CONFIG_EXIT, "penstock: config: run.root: the folder of run", "24 trained")
    assert await ended(setup.start("penstock_launch", "launch", "local", "--run.existing", "refuse")) == CONFIG_EXIT


async def kept(queue: Queue) -> int:
    """Records in the ledger."""
    return int(await queue.client.xlen(queue.keys.ledger))


async def strangers_are_refused(setup: UserCommands, name: str) -> None:
    """Launches from another folder, of the same keys and of others; services and a trainer of others."""
    own = setup.document
    document: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(own))
    setup.document = document
    document["run"]["root"] = "elsewhere"
    lives = f"run.name: '{name}' on Redis at {own['redis']['url']} lives"
    owner = f"folder {(setup.folder / 'runs' / name).resolve()}"
    result = await refused(setup, "penstock_launch", "launch", "local")
    assert_launch_ends(result, CONFIG_EXIT, f"penstock: stranger: {lives}", owner, "with the same configuration")
    document["reward"]["functions"] = {"own:length": 1.0}
    document["sampling"]["temperature"] = 0.5
    document["weights"]["pause_mode"] = "abort"
    differ = {
        "reward": "reward.functions is {'own:spread': 1.0} there and {'own:length': 1.0} here",
        "trainer": "sampling.temperature is 1.0 there and 0.5 here",
        "rollout": "weights.pause_mode is 'retract' there and 'abort' here",
    }
    (setup.folder / "elsewhere" / name / "steps").mkdir(parents=True)
    for existing in ("resume", "replace"):
        document["run"]["existing"] = existing
        result = await refused(setup, "penstock_launch", "launch", "local")
        assert_launch_ends(result, CONFIG_EXIT, f"penstock: stranger: {lives}", owner, *differ.values())
        assert ("and is not deleted" in result[1]) == (existing == "replace")
    assert (setup.folder / "elsewhere" / name / "steps").is_dir()
    for module in ("penstock_reward", "penstock_rollout", "penstock_trainer"):
        service = module.removeprefix("penstock_")
        result = await refused(setup, module)
        assert_one_line(result, CONFIG_EXIT, f"{service}: stranger: {lives}", owner, differ[service])
    setup.document = own


@pytest.fixture
def launches(tmp_path: Path, redis_server: EmbeddedServer) -> Iterator[LaunchSetup]:
    """Launches with services that only pretend to work: no trainer has a lease, the launcher alone holds the run."""
    launches = LaunchSetup(tmp_path)
    launches.write_config(
        run={"name": "t", "root": "runs", "max_steps": 10**6},
        redis={"url": redis_server.url, "password": redis_server.password},
        staleness={"heartbeat_seconds": 6},
    )
    yield launches
    end(launches.started)


def output_of(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=START_SECONDS)
    return output


def test_of_launches_at_the_same_moment_one_runs_and_is_not_disturbed(launches: LaunchSetup) -> None:
    started = {root: launches.launch("--run.root", root) for root in ("a", "b", "c")}
    running = [root for root, process in started.items() if not ended_early(process, started)]
    assert len(running) == 1, running
    [winner] = running
    for root, process in started.items():
        if root != winner:
            output = output_of(process)
            assert process.returncode == CONFIG_EXIT, output
            assert "penstock: stranger: run.name: 't' on Redis at" in output
            assert f"folder {(launches.folder / winner / 't').resolve()}, with the same configuration" in output
            assert not (launches.folder / root / "t" / "logs").exists()
    launches.run_folder = launches.folder / winner / "t"
    wait_for_text(launches, "trainer: started")
    launches.finish()
    output = output_of(started[winner])
    assert started[winner].returncode == 0, output


def ended_early(process: "subprocess.Popen[str]", started: "dict[str, subprocess.Popen[str]]") -> bool:
    """Whether this launch is one of those that end; waits until all but one have."""
    until(lambda: sum(each.poll() is not None for each in started.values()) >= len(started) - 1)
    return process.poll() is not None


def test_a_killed_launcher_blocks_neither_its_own_folder_nor_for_ever_another(launches: LaunchSetup) -> None:
    first = launches.launch("--run.root", "runs")
    wait_for_text(launches, "trainer: started")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    again = launches.launch("--run.root", "runs")
    wait_for_text(launches, "trainer: started", times=2)
    log = (launches.run_folder / "logs" / "launcher.log").read_text()
    assert "looking whether it lives" not in log
    os.kill(again.pid, signal.SIGKILL)
    again.wait()
    other = launches.launch("--run.root", "other", "--run.existing", "replace", "--run.max_steps", "2")
    output = output_of(other)
    assert other.returncode == 0, output  # it had to wait, unless it started more slowly than the hold ran out
    assert "queue: deleted" in output


def test_replace_says_what_it_deletes(launches: LaunchSetup) -> None:
    first = launches.launch("--run.max_steps", "1")
    assert "run t: new" in output_of(first)
    (launches.run_folder / "checkpoints" / "00000001.1").mkdir(parents=True)
    second = output_of(launches.launch("--run.max_steps", "1", "--run.existing", "replace"))
    assert "run.existing is replace: deleting the earlier run in runs/t (" in second
    assert "1 checkpoints, 0 recorded steps" in second
    assert "keys of an earlier run" in said(second)

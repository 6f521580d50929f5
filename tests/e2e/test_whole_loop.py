"""The full system through `penstock launch local`: the reward rises although each service is killed once."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from penstock.broker import connect
from penstock.config import RedisSection
from penstock.config.load import load_config
from penstock.contracts.services import ServiceRecord
from penstock_launch.run_folder import RunFolder
from tests.patience import ANSWER_SECONDS, START_SECONDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_STEPS = 36
BATCH_SIZE = 4
NUM_PROMPTS = 12
RUN_TIMEOUT_SECONDS = 1200  # it takes two minutes on an idle machine


def make_config(folder: Path, model: Path, sglang_python: str) -> Path:
    """A run of 36 steps of 4 prompts x 8 completions of 8 tokens."""
    for name, size in (("train", NUM_PROMPTS), ("held_out", 4)):
        rows = [{"prompt": f"{i}+{name[0]}=", "answer": "a"} for i in range(size)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "run": {"name": "e2e", "root": str(folder / "runs"), "stall_seconds": 600},
        "actor": {"path": str(model), "group_size": 8, "dtype": "float32"},
        "total_train_epochs": NUM_STEPS * BATCH_SIZE // NUM_PROMPTS,
        "optimizer": {"lr": 3.0e-3},
        "sampling": {"max_new_tokens": 8},
        "data": {
            "train": {"path": str(folder / "train.jsonl")},
            "eval": {"path": str(folder / "held_out.jsonl")},
            "batch_size": BATCH_SIZE,
        },
        "eval": {"every_steps": 12},
        "checkpoint": {"every_steps": 10},
        "weights": {"transport": "nccl"},  # all other runs use disk
        "rollout": {"engine": {"python": sglang_python, "dtype": "float32", "max_total_tokens": 4096}},
        "reward": {"functions": {"share_reward:share_of_a": 1.0}, "modules_path": str(Path(__file__).parent)},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Launch:
    """A running `penstock launch local`."""

    def __init__(self, config: Path) -> None:
        self.folder = config.parent / "runs" / "e2e"
        self.output = config.parent / "output.log"
        command = [sys.executable, "-m", "penstock_launch", "launch", "local", "--config", str(config)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def steps(self) -> list[dict[str, Any]]:
        path = self.folder / "steps.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def child(self, words: str) -> psutil.Process | None:
        """The direct or indirect child whose command line holds `words`."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if words in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        return None

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if (value := condition()) is not None and value is not False:
                return value
            if self.process.poll() is not None:
                pytest.fail(f"the launcher ended with {self.process.returncode} before {what}:\n{self.tail()}")
            time.sleep(0.2)
        pytest.fail(f"no {what} within {RUN_TIMEOUT_SECONDS} s:\n{self.tail()}")

    def tail(self) -> str:
        logs = [self.output, *sorted(self.folder.glob("logs/*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def kill_after_step(self, step: int, words: str) -> list[psutil.Process]:
        """Send SIGKILL to one process; returns the processes below it."""
        self.wait(lambda: len(self.steps()) >= step, f"step {step}")
        victim: psutil.Process = self.wait(lambda: self.child(words), f"process {words}")
        below = victim.children(recursive=True)
        victim.send_signal(signal.SIGKILL)
        return below

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=START_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(timeout=START_SECONDS)


@pytest.fixture
def launch(tmp_path: Path, tiny_model: Path, sglang_python: str) -> Iterator[Launch]:
    running = Launch(make_config(tmp_path, tiny_model, sglang_python))
    try:
        yield running
    finally:
        running.end()


@pytest.mark.timeout(2 * RUN_TIMEOUT_SECONDS)
def test_a_reward_rises_although_every_service_is_killed_once(launch: Launch) -> None:
    assert_all_answer(launch)
    launch.kill_after_step(4, "penstock_reward --config")
    launch.kill_after_step(8, "penstock_trainer --config")
    launch.kill_after_step(14, "valkey-server" if launch.child("valkey-server") else "redis-server")
    engine = launch.kill_after_step(20, "penstock_rollout --config")
    assert len(engine) >= 3  # HTTP server, scheduler, detokenizer
    _, alive = psutil.wait_procs(engine, timeout=ANSWER_SECONDS)
    assert alive == []  # no process of a killed service's engine is left
    launch.wait(lambda: launch.process.poll() is not None, "end of the run")
    assert launch.process.returncode == 0, launch.tail()

    summary = json.loads((launch.folder / "summary.json").read_text())
    steps = launch.steps()
    assert [line["step"] for line in steps] == list(range(NUM_STEPS))
    trained = [number for line in steps for number in line["tickets"]]
    assert trained == list(range(NUM_STEPS * BATCH_SIZE))
    tickets = summary["tickets"]
    assert tickets == {"issued": len(trained), "trained": len(trained), "dropped": {}, "outstanding": 0}
    assert summary["staleness_max"] <= summary["max_staleness"] == 1
    assert "0.5.21" in summary["engine"]
    first, last = (sum(line["reward_mean"] for line in part) / 5 for part in (steps[:5], steps[-5:]))
    assert first < 0.2
    assert last > first + 0.3
    assert summary["heldout_accuracy_end"] is not None
    assert_loads(launch.folder / "final")
    assert_replays(launch.folder)
    assert processes_of(launch.folder) == []


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes with the run's folder in their command line, whoever their parent is."""
    return [each for each in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(each.info["cmdline"] or [])]


def assert_all_answer(launch: Launch) -> None:
    """Check that every service answers during the run, and that the served version rises."""
    launch.wait(lambda: len(launch.steps()) >= 1, "the first step")
    records = asyncio.run(registered_services(launch))
    assert {record.kind for record in records} == {"rollout", "reward", "trainer"}
    for record in records:
        for path in ("/health", "/ready", "/metrics"):
            assert httpx.get(record.url + path).status_code == 200, (record, path)
        if record.kind != "reward":
            launch.wait(partial(has_later_version, record, weight_version(record)), "a later version")


def assert_loads(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<end>"


def assert_replays(folder: Path) -> None:
    """Check that every step, also those around the kills, gives the recorded weights without queue or engine."""
    command = [sys.executable, "-m", "penstock_launch", "replay", "--config", str(folder / "config.yaml")]
    replayed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_SECONDS, check=False)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    expected = f"{NUM_STEPS} of {NUM_STEPS} steps have the recorded digest, and none another"
    assert replayed.stdout.splitlines()[-1] == expected


async def registered_services(launch: Launch) -> list[ServiceRecord]:
    config = load_config(["--config", str(launch.folder / "config.yaml")], {})
    address = RunFolder(config.run).read_queue()
    assert address is not None
    section = RedisSection.model_validate({"url": address.url, "password": address.password})
    queue = await connect(config.model_copy(update={"redis": section}))
    try:
        return await queue.services()
    finally:
        await queue.close()


def weight_version(record: ServiceRecord) -> int:
    """The version that the service serves; -1 while it loads."""
    version = httpx.get(record.url + "/v1/weight_version").json()["policy_version"]
    return -1 if version is None else int(version)


def has_later_version(record: ServiceRecord, version: int) -> bool:
    return weight_version(record) > version

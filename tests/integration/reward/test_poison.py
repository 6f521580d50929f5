"""A run with one prompt on which the reward function always hangs: real services, a fake engine."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.broker import connect
from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config
from tests.integration.launch.user_commands import read_only
from tests.patience import START_SECONDS
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving

pytestmark = [pytest.mark.redis, pytest.mark.slow]

FUNCTIONS = """
import time

def spread(prompt, completion, answer, metadata):
    if answer == "hang":
        time.sleep(600)
    return float(len(set(completion)) % 3)
"""


class Services:
    """Processes of one run, in a folder of their own."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self._folder = folder
        self._started: list[subprocess.Popen[str]] = []
        (folder / "config.yaml").write_text(yaml.safe_dump(document))

    def start(self, module: str) -> "subprocess.Popen[str]":
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self._folder / f"{module}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, "--config", "config.yaml"],
                cwd=self._folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self._started.append(process)
        return process

    def log(self, module: str) -> str:
        return (self._folder / f"{module}.log").read_text()

    def kill(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
def document(tmp_path: Path, tiny_model: Path, redis_server: EmbeddedServer) -> dict[str, Any]:
    (tmp_path / "own.py").write_text(FUNCTIONS)
    rows = [{"prompt": "1+1=", "answer": "hang"}, *({"prompt": f"1+{n}=", "answer": "x"} for n in range(2, 8))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"name": f"poison-{tmp_path.name}", "root": "runs", "stall_seconds": 30},
        "actor": {"path": str(tiny_model), "group_size": 2, "dtype": "float32"},
        "total_train_epochs": 2,
        "sampling": {"max_new_tokens": 4},
        "data": {"train": {"path": "train.jsonl"}, "batch_size": 2},
        "staleness": {"heartbeat_seconds": 1, "max_staleness": 0},
        "weights": {"canary_tokens": 0},  # the engine is a fake, which does not compute the model
        "reward": {
            "functions": {"own:spread": 1.0},
            "timeout_seconds": 0.5,
            "breaker_failures": 4,  # fewer than the group's six calls
            "breaker_seconds": 0.2,
            "retry_seconds": 0.01,
        },
        "redis": {"url": redis_server.url, "password": redis_server.password},
    }


@pytest.fixture
def services(tmp_path: Path, document: dict[str, Any]) -> Iterator[list[Services]]:
    made: list[Services] = []
    yield made
    for each in made:
        each.kill()


async def test_a_run_with_one_prompt_on_which_the_reward_hangs_goes_on_to_its_end(
    tmp_path: Path, document: dict[str, Any], services: list[Services], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.rollout.fake_model.VOCABULARY", 43)  # the tiny model's
    async with serving(FakeSGLang()) as url:
        document["rollout"] = {"engine": {"url": url}}
        services.append(run := Services(tmp_path, document))
        for module in ("penstock_reward", "penstock_rollout"):
            run.start(module)
        trainer = run.start("penstock_trainer")
        async with asyncio.timeout(START_SECONDS):
            while trainer.poll() is None:  # noqa: ASYNC110 - a process that is waited for
                await asyncio.sleep(0.1)
        assert trainer.returncode == 0, run.log("penstock_trainer")
        queue = await connect(Config.model_validate(document))
        try:
            ledger = await read_only(queue).ledger()
        finally:
            await queue.close()
    assert sorted([*(ticket for step in ledger.steps for ticket in step.tickets), *ledger.dropped]) == list(range(14))
    assert set(ledger.dropped.values()) == {"reward_failed"}
    assert len(ledger.dropped) == 2, "the prompt of both epochs"
    assert "is open" not in run.log("penstock_reward")

"""A configuration that works, the commands of a user, and checks of how they end."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import yaml

from penstock.broker import Queue
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.trainer import TrainerQueue
from penstock.weights.local_folder import SHARED_MEMORY, free_memory_of_run, name_of_run
from tests.patience import START_SECONDS

PURE_ENGINE = Path(__file__).parents[3] / "benchmarks" / "chaos" / "engine.py"
# Answers the probe like an environment with SGLang. `$PPID` is the rollout service whose engine this is.
ENGINE = """#!/bin/sh
if [ "$1" = "-c" ]; then echo '["0.5.21", false]'; exit 0; fi
{before}
exec {python} {script} "$@"
"""
SPREAD = "def spread(prompt, completion, answer, metadata):\n    return float(len(set(completion)) % 3)\n"
SLOW = "penstock: looking at what the configuration names"  # printed if that takes long
END_SECONDS = 2 * START_SECONDS  # a start and some steps


class UserCommands:
    """A folder with a configuration that works, and the commands of a user."""

    def __init__(self, folder: Path, model: Path, server: EmbeddedServer | None = None) -> None:
        """`server`: of the queue; None for one of the launch."""
        self.folder = folder
        self.document: dict[str, Any] = {
            "run": {"name": f"errors-{folder.name}", "root": "runs", "stall_seconds": 300},
            "actor": {"path": str(model), "group_size": 2, "dtype": "float32"},
            "total_train_epochs": 8,
            "sampling": {"max_new_tokens": 4},
            "data": {"train": {"path": "train.jsonl"}, "batch_size": 2},
            "staleness": {"heartbeat_seconds": 5},
            "rollout": {"engine": {"python": "no-such-python", "start_timeout_seconds": START_SECONDS}},
            "weights": {"canary_tokens": 0},  # the engine is a fake, which does not compute the model
            "reward": {"functions": {"exact_match": 1.0}},
        }
        if server is not None:
            self.document["redis"] = {"url": server.url, "password": server.password}
        self.run_folder = folder / "runs" / f"errors-{folder.name}"
        self.write_rows({"prompt": "1+1=", "answer": "2"}, {"prompt": "1+2=", "answer": "3"})
        self.started: list[subprocess.Popen[str]] = []
        self.environ = dict(os.environ)

    def write_rows(self, *rows: dict[str, Any]) -> None:
        (self.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def score_by(self, name: str, source: str) -> None:
        """Score completions by the function `name` of a module with this source."""
        (self.folder / "own.py").write_text(source)
        self.document["reward"]["functions"] = {f"own:{name}": 1.0}

    def use_pure_engine(self, before: str = "", start_attempts: int = 4) -> None:
        """Put engines without a model in SGLang's place; `before`: shell commands at each start."""
        python = self.folder / "python"
        python.write_text(ENGINE.format(before=before, python=sys.executable, script=PURE_ENGINE))
        python.chmod(0o755)
        self.document["rollout"]["engine"] |= {"python": str(python), "start_attempts": start_attempts}
        self.score_by("spread", SPREAD)

    def embed_queue(self) -> None:
        del self.document["redis"]

    def start(self, module: str, *words: str) -> "subprocess.Popen[str]":
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.document))
        kept = {name: value for name, value in self.environ.items() if not name.startswith("PENSTOCK_")}
        environment = {
            **kept,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", module, *words[:2], "--config", "config.yaml", *words[2:]]
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.started.append(process)
        return process

    def run(self, module: str, *words: str) -> tuple[int, str]:
        """Run a command that must end by itself; returns its exit code and output."""
        process = self.start(module, *words)
        output, _ = process.communicate(timeout=END_SECONDS)
        return process.returncode, output

    def start_services(self, engine_url: str) -> None:
        """Start a reward service, and a rollout service whose engine is at this URL."""
        self.document["rollout"]["engine"] = {"url": engine_url}
        for module in ("penstock_reward", "penstock_rollout"):
            self.start(module)

    def end(self) -> None:
        """Kill what still runs."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        free_memory_of_run(self.run_folder.name, self.run_folder)  # what a trainer without a launcher leaves

    def launch(self, *overrides: str) -> tuple[int, str]:
        """Checks that no weights stay in the host's memory, however it ends."""
        result = self.run("penstock_launch", "launch", "local", *overrides)
        name = name_of_run(self.run_folder.name, self.run_folder)
        assert not list(SHARED_MEMORY.glob(f"{name}*"))
        return result


def checked(user: UserCommands, *words: str) -> tuple[int, str]:
    """Exit code and output of `penstock check`, or of another command."""
    return user.run("penstock_launch", *(words or ("check",)))


def without_torch(user: UserCommands) -> None:
    """An import of torch fails now: an answer that comes all the same comes without those seconds."""
    (user.folder / "torch.py").write_text("raise AssertionError('torch was imported')\n")


def said(output: str) -> str:
    """The lines for people: without the log's JSON lines, and what a busy machine adds."""
    return "\n".join(line for line in output.splitlines() if not line.startswith("{") and line != SLOW)


def assert_one_line(result: tuple[int, str], exit_code: int, *texts: str) -> None:
    """Check that the process ended with the code, and printed one line, which holds the texts."""
    code, output = result
    assert code == exit_code, output
    assert "Traceback" not in output
    lines = said(output).splitlines()
    assert len(lines) == 1, output
    for text in texts:
        assert text in lines[0]


def assert_launch_ends(result: tuple[int, str], exit_code: int, *texts: str) -> None:
    """Check that the launcher ended with the code, and that its output holds the texts."""
    code, output = result
    assert code == exit_code, output
    assert "Traceback" not in output
    for text in texts:
        assert text in output, output


async def ended(process: "subprocess.Popen[str]") -> int:
    """Wait until the process has ended by itself; returns its exit code."""
    deadline = time.monotonic() + END_SECONDS
    while process.poll() is None:
        assert time.monotonic() < deadline, "the process did not end in time"
        await asyncio.sleep(0.05)
    return int(process.returncode)


async def eventually(look: Callable[[], Awaitable[int]], least: int, process: "subprocess.Popen[str]") -> None:
    """Wait until `look` gives at least `least`, while the process lives."""
    deadline = time.monotonic() + END_SECONDS
    while await look() < least:
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def read_only(queue: Queue) -> TrainerQueue:
    """The trainer's side of the queue without a lease: it can only read."""
    without_lease: Any = None
    return TrainerQueue(queue, without_lease)


async def trained(queue: Queue) -> int:
    """The number of trained tickets."""
    return (await read_only(queue).counters()).trained

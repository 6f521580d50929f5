"""A folder in which the real `penstock` command runs, with services that only pretend to work.

The stand-ins are modules of the services' names that shadow the real ones; they register and serve like them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import yaml

from penstock.records.processes import KnownProcess, KnownProcesses
from penstock.runtime.process import ProcessIdentity
from tests.patience import START_SECONDS

TORCHRUN = Path(__file__).parents[3] / "services" / "trainer" / "penstock_trainer" / "torchrun.py"
EMPTY_SAFETENSORS = (2).to_bytes(8, "little") + b"{}"
NUM_ROWS = 8  # a batch, by default
SGLANG = """#!/bin/sh
echo '["0.5.21", false]'
"""
STAND_IN = """
import asyncio, contextlib, json, os, pathlib, sys, time
from prometheus_client import CollectorRegistry
from penstock.runtime import service
from penstock.broker import connect
from penstock.contracts import ServiceKind
from penstock.contracts.ledger import RunRecord, StepRecord, encode_record
from penstock.contracts.services import ServiceRecord
from penstock.errors import ConfigError
from penstock.runtime.http import make_app

KIND = {kind!r}


async def start(config):
    if KIND == "trainer" and config.actor.path == "spoilt":
        raise ConfigError("actor.path: 'spoilt' cannot be used; expected a Hugging Face folder")
    folder = pathlib.Path(config.run.root) / config.run.name
    if os.environ.get("RANK", "0") != "0":
        while not (folder / "trainer_summary.json").exists():
            time.sleep(0.05)
        return
    served = service.Service("127.0.0.1", 0, KIND + ".port")
    queue = await connect(config)
    questions = iter(range(10**9))
    late = lambda: None if next(questions) > 1 else "loads the model"
    app = make_app(KIND, not_ready=late, metrics=CollectorRegistry())
    step = [0]
    phase = ["training"]
    seen = asyncio.Event()  # the last step, by the launcher

    @app.get("/v1/status")
    async def status():
        seen.set()
        steps = [{{"number": number + 1, "reward": number / 100, "loss": 0.5, "failed_ratio": 0.25, "seconds": 0.25}}
                 for number in range(step[0])]
        return {{"run": config.run.name, "phase": phase[0], "step": step[0], "total_steps": config.run.max_steps,
                 "reward_mean": 0.5, "queue": await queue.depths(), "first_step": 0, "steps": steps[-60:],
                 "heldout_accuracy": 0.4, "heldout_steps": 0, "heldout_accuracy_start": 0.4, "kl_of": "reference"}}

    async def ends():
        phase[0] = "ending: writing a checkpoint"
        seen.clear()
        await asyncio.wait_for(seen.wait(), 5)  # as a checkpoint takes its time
        while (folder / "hold").exists():
            await asyncio.sleep(0.05)

    def write(name, **line):
        # A full disk is the launcher's matter here.
        with contextlib.suppress(OSError), (folder / name).open("a") as file:
            file.write(json.dumps(line) + "\\n")

    def commit(record):
        (folder / "steps").mkdir(exist_ok=True)
        with (folder / "steps/ledger.jsonl").open("ab") as file:
            file.write(encode_record(record) + b"\\n")

    def write_step(number):
        now = time.time()
        commit(StepRecord(number, (number,), "file", "digest"))
        write("steps.jsonl", step=number, version=number, epoch=0.0, started_at=now, ended_at=now + 0.5,
              seconds={{"step": 0.5}}, generation_seconds=0.1, generated_tokens=1, reward_mean=0.5, staleness_max=0,
              statistics={{}})

    async def work():
        if KIND == "trainer" and step[0] == 0:
            commit(RunRecord("digest", 1_000_000, 1, 1, 0))
            write("evals.jsonl", steps=0, accuracy=0.25, reward_mean=0.25, num_prompts=20, num_failed=0,
                  samples=[{{"prompt": "Add: 1+1=", "completion": "2 " * 60, "answer": "2", "reward": 0.5}}])
        while KIND == "trainer" and step[0] < config.run.max_steps and not (folder / "finish").exists():
            stopping, asked = [asyncio.ensure_future(each.wait()) for each in (served.stop, seen)]
            await asyncio.wait((stopping, asked), timeout=1, return_when=asyncio.FIRST_COMPLETED)
            if served.stop.is_set():
                break
            for _ in range(2 * seen.is_set()):  # faster than the launcher looks
                if step[0] < config.run.max_steps:
                    write_step(step[0])
                    step[0] += 1
            seen.clear()
        if KIND != "trainer":
            await served.stop.wait()
        else:
            with contextlib.suppress(TimeoutError):
                await ends()
            summary = {{"steps": step[0], "heldout_steps_start": 0, "heldout_steps_end": step[0],
                        "heldout_reward_end": 0.95, "heldout_prompts": 20, "heldout_prompts_trained": 0,
                        "samples_after": [{{"prompt": "1+1=", "completion": "2", "answer": "2", "reward": 1.0}}]}}
            (folder / "trainer_summary.json").write_text(json.dumps(summary))

    async def announce():
        state = "ready" if KIND in ("agent", "reward") else "serving"
        while True:
            record = ServiceRecord(ServiceKind(KIND), KIND + str(os.getpid()), served.url, os.getpid(), state)
            await queue.register(record, 5)
            await asyncio.sleep(0.3)

    await served.run(app, background=[announce()], work=work())
    await queue.close()


service.main(KIND, start)
"""


class LaunchSetup:
    """A configuration, stand-ins, and the `penstock` command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_folder = folder / "runs" / "t"
        self.started: list[subprocess.Popen[str]] = []
        self.environ = dict(os.environ)
        for kind in ("rollout", "agent", "reward", "trainer"):
            module = folder / "modules" / f"penstock_{kind}"
            module.mkdir(parents=True)
            (module / "__init__.py").write_text("")
            (module / "__main__.py").write_text(STAND_IN.format(kind=kind))
        shutil.copy(TORCHRUN, folder / "modules" / "penstock_trainer")
        self._write_what_it_names()
        self.write_config()

    def _write_what_it_names(self) -> None:
        """What a launch looks for before it starts anything: models, rows, an interpreter that has SGLang."""
        for model in ("m", "spoilt"):
            (self.folder / model).mkdir()
            (self.folder / model / "config.json").write_text("{}")
            (self.folder / model / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
        (self.folder / "d.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * NUM_ROWS)
        python = self.folder / ".venv-sglang" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(SGLANG)
        python.chmod(0o755)

    def write_config(self, **sections: object) -> None:
        document: dict[str, object] = {
            "run": {"name": "t", "root": "runs", "max_steps": 3},
            "actor": {"path": "m", "dtype": "float32"},
            "rollout": {"engine": {"dtype": "float32"}},  # of bfloat16 a launch warns on some CPUs
            "data": {"train": {"path": "d.jsonl"}},
            **sections,
        }
        (self.folder / "config.yaml").write_text(yaml.safe_dump(document))

    def command(
        self,
        *words: str,
        before: Sequence[str] = (),
        stdin: int | None = None,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.STDOUT,
    ) -> "subprocess.Popen[str]":
        """`before`: the words of a command that runs this one, such as nohup."""
        search = [str(self.folder / "modules"), *filter(None, sys.path)]
        inherited = {name: value for name, value in self.environ.items() if name != "PYTHONUNBUFFERED"}
        environment = {**inherited, "PYTHONPATH": os.pathsep.join(search)}
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "penstock_launch", *words],
            cwd=self.folder,
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=True,
        )
        self.started.append(process)
        return process

    def launch(self, *overrides: str) -> "subprocess.Popen[str]":
        return self.command("launch", "local", "--config", "config.yaml", *overrides)

    def end(self) -> None:
        """End what still runs."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    def processes(self) -> list[KnownProcess]:
        try:
            data = (self.run_folder / "processes.json").read_bytes()
        except FileNotFoundError:
            return []
        return list(msgspec.json.decode(data, type=KnownProcesses).processes)

    def identity(self, service: str) -> ProcessIdentity:
        found: list[ProcessIdentity] = []

        def look() -> bool:
            found[:] = [each.identity for each in self.processes() if each.service == service and each.identity.alive]
            return bool(found)

        until(look)
        return found[0]

    def finish(self) -> None:
        """Let the trainer finish, however many steps are left."""
        (self.run_folder / "finish").touch()

    def summary(self) -> dict[str, object]:
        document: dict[str, object] = json.loads((self.run_folder / "summary.json").read_text())
        return document


def until(condition: Callable[[], object], timeout_seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.02)


def wait_for_text(setup: LaunchSetup, text: str, times: int = 1) -> None:
    log = setup.run_folder / "logs" / "launcher.log"
    until(lambda: log.exists() and log.read_text().count(text) >= times)


def all_up(setup: LaunchSetup) -> list[KnownProcess]:
    wanted = {"queue", "rollout", "reward", "trainer", "launcher"}
    until(lambda: wanted <= {each.service for each in setup.processes()})
    return setup.processes()

"""The parts of the chaos run: their configurations and plans, from start to findings.

Owns what runs where. Invariant: when a part ends, however it ends, nothing that it started is left.
"""

import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import redis
import yaml

from benchmarks.chaos.chaos_environment import FAULTS
from benchmarks.chaos.disturb import ChaosError, Disturber, Record
from benchmarks.chaos.launch import ROOT, Launch
from benchmarks.chaos.model import make_tiny_model, write_prompts
from benchmarks.chaos.own_queue import OwnQueue
from benchmarks.chaos.reader import Findings, RunReader
from benchmarks.chaos.schedule import Plan
from penstock.broker.embedded import EmbeddedServer

NUM_PROMPTS = 16
BATCH_SIZE = 4
HEARTBEAT_SECONDS = 3
MAX_RUNNING = 32
ENVIRONMENT = "benchmarks.chaos.chaos_environment:EarlyLetters"
PASSING_FAULTS = ("hangs",) * 4 + ("sometimes",) * 2  # of further rows: some of their episodes give a group
PURE_ENGINE = """#!/bin/sh
# Stands in for the interpreter of SGLang's environment.
if [ "$1" = "-c" ]; then echo '["0.5.21", false]'; exit; fi
shift 2
exec "{python}" "{script}" --token-seconds {token_seconds} "$@"
"""


@dataclass(frozen=True)
class ChaosPart:
    """One run. `sglang_python`: the interpreter of a real SGLang, with a queue that the launcher starts; if empty, the
    run has the pure engine and an `OwnQueue`. num_steps: of full batches, or one less: of a run of agents some rows
    give no group that can be trained. num_agents: agent services; 0: completions instead of episodes.
    """

    name: str
    plan: Plan
    num_steps: int
    max_staleness: int
    deadline_seconds: float
    num_servers: int = 1
    sglang_python: str = ""
    token_seconds: float = 0.02
    full_every: int = 0  # 0: full versions; else deltas, with every so many in full
    take_turns: bool = False
    num_agents: int = 0

    @property
    def num_tickets(self) -> int:
        return self.num_steps * BATCH_SIZE + self.num_failing

    @property
    def num_failing(self) -> int:
        """Of the tickets, those whose episodes all fail."""
        if not self.num_agents:
            return 0
        num_epochs = self.num_steps * BATCH_SIZE // (NUM_PROMPTS - len(FAULTS))
        return num_epochs * len(FAULTS)

    @property
    def paced_steps(self) -> int:
        """All steps but the last: groups scored before the reward slows down are still trained afterwards."""
        return self.num_steps - 2 * (self.max_staleness + 2)


NOTHING = Plan(kills={}, freezes={}, num_cuts=0, num_lost_tails=0, mean_pause_seconds=1, rest_seconds=1)


def prepare(part: ChaosPart, folder: Path) -> tuple[Launch, OwnQueue | None, Path]:
    """Write what a part needs into an empty folder; returns its launch (not started), its own queue, its pace file."""
    folder.mkdir(parents=True)
    model, pace_file = folder / "model", folder / "pace"
    make_tiny_model(model)
    write_prompts(folder / "train.jsonl", NUM_PROMPTS, pace_file, lambda number: further_metadata(part, folder, number))
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(part_config(part, folder)), encoding="utf-8")
    queue = None if part.sglang_python else OwnQueue(folder / "queue")
    return Launch(config, folder / "runs" / "chaos", queue.environment if queue else {}), queue, pace_file


def run_part(part: ChaosPart, folder: Path, seed: int) -> tuple[Record, Findings]:
    """Run a part in an empty folder; ChaosError unless all checks pass."""
    launch, queue, pace_file = prepare(part, folder)
    record = Record(seed, part.name)
    try:
        launch.start()
        disturber = Disturber(launch, part.plan, record, pace_file, part.paced_steps, queue, MAX_RUNNING)
        try:
            disturber.run(part.deadline_seconds)
        finally:
            disturber.give_back()
            launch.end()
        findings = read_part(part, launch, queue)
    finally:
        if queue is not None:
            queue.stop()
    left = launch.left_over()
    problems = findings.problems + ([f"processes are left: {left}"] if left else [])
    if part.plan.num_storms and not record.num_refused:
        problems.append("no storm has made a server refuse a call")
    if problems:
        shown = "\n".join(problems[:20])
        raise ChaosError(record.explain(f"{len(problems)} checks failed:\n{shown}", folder))
    return record, findings


def read_part(part: ChaosPart, launch: Launch, queue: OwnQueue | None) -> Findings:
    """Check what a finished part left. The launcher's queue has ended too, so a new server reads its data."""
    server = queue.server if queue else EmbeddedServer(launch.run_folder / "queue")
    if queue is None:
        server.start()
    try:
        with redis.Redis(port=server.port, password=server.password) as client:
            reader = RunReader(client, "chaos", launch.run_folder)
            return reader.read(
                num_tickets=part.num_tickets,
                batch_size=BATCH_SIZE,
                max_staleness=part.max_staleness,
                num_failing=part.num_failing,
                failing=FAULTS,
            )
    finally:
        if queue is None:
            server.stop()


def part_config(part: ChaosPart, folder: Path) -> dict[str, Any]:
    """The configuration of a part in its folder, as a document."""
    python = part.sglang_python or str(make_pure_engine(folder, part.token_seconds))
    canary_tokens = 16 if part.sglang_python else 0  # the pure engine does not compute the model
    engine = {"python": python, "dtype": "float32", "max_total_tokens": 4096, "max_running_requests": MAX_RUNNING}
    functions = {"benchmarks.chaos.chaos_rewards:share_of_early_letters": 1.0}
    if part.num_agents:
        functions["environment"] = 1.0
    return {
        **({"agent": agent_section(part)} if part.num_agents else {}),
        "run": {"name": "chaos", "root": str(folder / "runs"), "stall_seconds": 90},
        "actor": {"path": str(folder / "model"), "group_size": 4, "dtype": "float32"},
        "weights": {  # a failed run leaves nothing in /dev/shm
            "transport": "disk",
            "folder": str(folder / "weights"),
            "full_every": part.full_every,
            "local_folder": str(folder / "local"),
            "canary_tokens": canary_tokens,
        },
        "total_train_epochs": -(-part.num_tickets // NUM_PROMPTS),
        "optimizer": {"lr": 1.0e-3},
        "sampling": {"max_new_tokens": 10},
        "data": {"train": {"path": str(folder / "train.jsonl")}, "batch_size": BATCH_SIZE},
        "checkpoint": {"every_steps": 7},
        "staleness": {
            "max_staleness": part.max_staleness,
            "heartbeat_seconds": HEARTBEAT_SECONDS,
            "claim_idle_seconds": 10,
        },
        "trainer": {"take_turns": part.take_turns},
        "rollout": {"num_servers": part.num_servers, "engine": engine},
        "reward": {
            "num_services": part.num_servers,
            "functions": functions,
            "modules_path": str(ROOT),
        },
    }


def agent_section(part: ChaosPart) -> dict[str, Any]:
    """Deadlines that hung environments reach soon, and busy machines do not."""
    return {
        "environment": ENVIRONMENT,
        "modules_path": str(ROOT),
        "num_services": part.num_agents,
        "sessions": 16,
        "max_turns": 4,
        "max_tokens": 128,
        "timeout_seconds": 120,
        "call_timeout_seconds": 3,
        "template": "plain",
    }


def further_metadata(part: ChaosPart, folder: Path, number: int) -> dict[str, str]:
    """What else a row holds: for an environment, its fault, and where it remembers that it did hang."""
    if not part.num_agents:
        return {}
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    return {"fault": dict(enumerate((*FAULTS, *PASSING_FAULTS))).get(number, ""), "folder": str(marks)}


def make_pure_engine(folder: Path, token_seconds: float) -> Path:
    """An executable that looks like an interpreter with SGLang and runs the pure engine."""
    path = folder / "engine-python"
    script = Path(__file__).with_name("engine.py")
    path.write_text(PURE_ENGINE.format(python=sys.executable, script=script, token_seconds=token_seconds))
    os.chmod(path, 0o755)
    return path


def figures(record: Record, findings: Findings, bit_identical: bool | None) -> dict[str, Any]:
    """A part's entry in summary.json."""
    found = asdict(findings)
    del found["problems"]
    return {
        "kills": sum(record.kills.values()),
        "kills_by_target": dict(sorted(record.kills.items())),
        **found,
        "bit_identical": bit_identical,
        "others": dict(sorted(record.others.items())),
        "num_refused": record.num_refused,
        "time_line": record.time_line,
    }

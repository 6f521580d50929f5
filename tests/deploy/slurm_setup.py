"""A run for the cluster of `slurm_cluster`, and the `penstock` command.

The queue, the services and the trainer are real; the pure engine of the chaos run, which needs no model, replaces
SGLang.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.chaos.launch import ROOT
from benchmarks.chaos.model import make_tiny_model, write_prompts
from benchmarks.chaos.parts import make_pure_engine
from tests.deploy.slurm_cluster import SlurmCluster, until

LOOPBACK = "127.0.0.1"
NUM_PROMPTS = 16
BATCH_SIZE = 4


class SlurmSetup:
    """One run's configuration and its folder."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run_folder = folder / "runs" / "job"
        self.config = folder / "config.yaml"
        self._pace_file = folder / "pace"
        make_tiny_model(folder / "model")
        write_prompts(folder / "train.jsonl", NUM_PROMPTS, self._pace_file)

    def write(self, *, num_steps: int, **sections: Any) -> None:
        """The configuration of a run with this many steps, in full epochs; `sections` are merged into it."""
        assert num_steps * BATCH_SIZE % NUM_PROMPTS == 0
        engine = {"python": str(make_pure_engine(self.folder, 0.01)), "dtype": "float32", "max_running_requests": 32}
        document: dict[str, Any] = {
            "run": {"name": "job", "root": str(self.folder / "runs"), "stall_seconds": 90},
            "actor": {"path": str(self.folder / "model"), "group_size": 4, "dtype": "float32"},
            "total_train_epochs": num_steps * BATCH_SIZE // NUM_PROMPTS,
            "optimizer": {"lr": 1.0e-3},
            "sampling": {"max_new_tokens": 8},
            "data": {"train": {"path": str(self.folder / "train.jsonl")}, "batch_size": BATCH_SIZE},
            "checkpoint": {"every_steps": 5},
            "staleness": {"heartbeat_seconds": 3},
            "rollout": {"engine": engine},
            "weights": {"canary_tokens": 0},  # the pure engine does not compute the model
            "reward": {
                "functions": {"benchmarks.chaos.chaos_rewards:share_of_early_letters": 1.0},
                "modules_path": str(ROOT),
            },
            "slurm": {
                "partition": "cpu",
                "time_limit": "10:00",
                "listen_host": LOOPBACK,
                "trainer": {"partition": "gpu", "gpus_per_node": 1},
            },
        }
        for name, section in sections.items():
            document[name] = {**document.get(name, {}), **section} if isinstance(section, dict) else section
        self.config.write_text(yaml.safe_dump(document), encoding="utf-8")

    def slow_down(self, seconds: float) -> None:
        """Set how long every reward takes from now on, so that a run does not end before it is disturbed."""
        self._pace_file.write_text(str(seconds), encoding="ascii")

    def penstock(self, *words: str, exit_code: int = 0) -> str:
        """Run the command; returns its output."""
        search = os.pathsep.join(filter(None, [str(ROOT), *sys.path]))
        done = subprocess.run(
            [sys.executable, "-m", "penstock_launch", *words, "--config", str(self.config)],
            cwd=self.folder,
            env={**self.cluster.environment, "PYTHONPATH": search},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.returncode == exit_code, done.stdout
        return done.stdout

    def submit(self) -> str:
        """Submit the job; returns its id."""
        self.penstock("launch", "slurm")
        job_id: str = json.loads((self.run_folder / "slurm.json").read_text())["job_id"]
        return job_id

    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps.jsonl."""
        try:
            lines = (self.run_folder / "steps.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def wait_for_step(self, count: int) -> None:
        until(lambda: len(self.steps()) >= count, f"{count} steps", 150)

    def log(self, name: str = "slurm") -> str:
        path = self.run_folder / "logs" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def summary(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.run_folder / "summary.json").read_text())
        return document

    def logs(self) -> str:
        """The ends of all logs, for a test that fails."""
        names = sorted(path.stem for path in (self.run_folder / "logs").glob("*.log"))
        return "\n".join(f"== {name}\n{self.log(name)[-2500:]}" for name in names)

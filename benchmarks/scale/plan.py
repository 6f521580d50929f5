"""What is run: how many services, for how long, and what happens to them; and its configuration.

Invariant: the load is the same with any number of services. As many groups are outstanding and take as long, so that
what a group costs differs by the services alone.
"""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.launch import ROOT
from benchmarks.chaos.model import make_tiny_model, write_prompts

RUN = "scale"
GROUP_SIZE = 2
MAX_NEW_TOKENS = 8
EPOCHS = 100_000  # of one batch: more than a run gets to, since it is stopped


@dataclass(frozen=True)
class ScalePlan:
    """One run: first with `few` services, then with `many`, then with many of which hosts end and return.

    compared_seconds: of each of the first two windows; seconds: of the third. warm_up_seconds: before what counts, each
    time. generation_seconds: the mean of a completion. disturb_seconds: between two hosts that end, in turns by SIGKILL
    and in order; a new host takes the place of each after away_seconds. per_host: services of one process. batch_size:
    groups.
    """

    many: int = 1000
    few: int = 16
    seconds: float = 600.0
    compared_seconds: float = 90.0
    warm_up_seconds: float = 30.0
    per_host: int = 100
    batch_size: int = 512
    max_staleness: int = 1
    generation_seconds: float = 10.0
    heartbeat_seconds: float = 20.0
    disturb_seconds: float = 75.0
    away_seconds: float = 20.0
    seed: int = 1
    step_deadline_seconds: float = 300.0

    @property
    def most_outstanding(self) -> int:
        return (self.max_staleness + 1) * self.batch_size

    def room_of(self, num_services: int) -> int:
        """Completions of one service: all services together can run twice what may be outstanding."""
        return GROUP_SIZE * max(1, -(-2 * self.most_outstanding // num_services))


def prepare(plan: ScalePlan, folder: Path) -> None:
    """Write model and prompts into an empty folder. The model in a process of its own: torch takes 200 MB."""
    making = multiprocessing.get_context("spawn").Process(target=make_tiny_model, args=(folder / "model",))
    making.start()
    making.join()
    write_prompts(folder / "train.jsonl", plan.batch_size, folder / "pace")  # there is no pace file: as fast as it can


def document(plan: ScalePlan, folder: Path, redis_url: str, room: int) -> dict[str, Any]:
    """The configuration, without the queue's password. room: completions of one service."""
    return {
        "run": {"name": RUN, "root": str(folder / "runs"), "stall_seconds": plan.step_deadline_seconds},
        "redis": {"url": redis_url, "timeout_seconds": 60},
        "actor": {"path": str(folder / "model"), "group_size": GROUP_SIZE, "dtype": "float32"},
        "weights": {"transport": "disk", "folder": str(folder / "weights"), "canary_tokens": 0},
        "total_train_epochs": EPOCHS,
        "optimizer": {"lr": 1.0e-4},
        "sampling": {"max_new_tokens": MAX_NEW_TOKENS},
        "data": {"train": {"path": str(folder / "train.jsonl")}, "batch_size": plan.batch_size},
        "checkpoint": {"every_steps": 10, "keep_step_bytes": 2**40},  # the verdict reads all step files
        "staleness": {"max_staleness": plan.max_staleness, "heartbeat_seconds": plan.heartbeat_seconds},
        "rollout": {"num_servers": plan.many, "engine": {"max_running_requests": room}},
        "reward": {
            "functions": {"benchmarks.chaos.chaos_rewards:share_of_early_letters": 1.0},
            "modules_path": str(ROOT),
        },
    }

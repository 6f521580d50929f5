"""The tasks that launched services learn: the configuration of each, and how long it is trained.

Owns the table. A task is configuration files and keys laid over them; nothing here trains.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.baselines.objectives import loss_keys
from penstock.config import Config
from penstock.config.load import load_config

ROOT = Path(__file__).resolve().parents[3]
OWN_LOSS = "own"  # the section `loss` of the task's files as it is
FOLDER = "benchmarks/baselines/launched"
REASONING = f"{FOLDER}/reasoning.yaml"


@dataclass(frozen=True)
class Task:
    """files: from the repository's root, each laid over those before. keys: dotted, laid over them.

    lag: `staleness.max_staleness` of its baseline. num_seeds: at most five.
    """

    files: tuple[str, ...]
    keys: Mapping[str, str] = field(default_factory=dict)
    lag: int = 1
    num_seeds: int = 5


TASKS: Mapping[str, Task] = {
    "addition": Task(("examples/demo/config.yaml",), {"eval.every_steps": "5"}),
    "calculator": Task(("examples/calculator/config.yaml",), {"eval.every_steps": "4"}),
    "chain_sum": Task((REASONING, f"{FOLDER}/chain_sum.yaml")),
    "gcd": Task((REASONING, f"{FOLDER}/gcd.yaml")),
    "gsm8k": Task(("examples/gsm8k/config.yaml", "examples/gsm8k/cpu.yaml"), num_seeds=1),
}


def configuration(
    task: str, objective: str, lag: int, seed: int, rows: str = "", further: Mapping[str, str] | None = None
) -> Config:
    """The configuration of a cell.

    rows: a folder or file with the rows of a task from the Hugging Face hub, instead of the hub. further: dotted keys
    of where and how it runs on this machine.
    """
    known = TASKS[task]
    files = [word for path in known.files for word in ("--config", str(ROOT / path))]
    keys = {**known.keys, "run.seed": str(seed), "staleness.max_staleness": str(lag)}
    if rows:
        keys |= {"data.train.path": rows, "data.eval.path": rows}
    words = [word for key, value in {**keys, **(further or {})}.items() for word in (f"--{key}", value)]
    config = load_config([*files, *words], {})
    if objective == OWN_LOSS:
        return config
    loss = {**config.loss.model_dump(), **loss_keys(objective)}
    return Config.model_validate({**config.model_dump(), "loss": loss})

"""Compares the launcher's estimate of a trainer's memory with what a real update takes, in one run on a CPU.

Owns the cases and the table. Each case and each rank has a process of its own; cases run one after the other. Start it
from the repository's root; it needs no quiet machine, as it measures no time:

    .venv/bin/python -m benchmarks.memory_estimate
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.counted_memory import counted, groups_of, held_bytes, resident_growth
from benchmarks.learner import RETURN_FREED
from benchmarks.learner_side import LR
from penstock.config import Config
from penstock.contracts import ScoredGroup
from penstock_launch.gpus.memory import MIB
from penstock_launch.gpus.model_shape import read_shape
from penstock_launch.gpus.trainer_memory import host_need, trainer_need
from penstock_trainer.distributed.rank import RankInfo
from penstock_trainer.distributed.ranks import Ranks
from penstock_trainer.learner.learner import Learner
from penstock_trainer.weights.buckets import WeightCopy
from penstock_trainer.weights.files import published_format

ROOT = Path(__file__).parents[1]
NUM_PACKS = 2  # of each rank: the second one finds the gradient of the first
FIRST_TOKEN, WARM_UP_ROWS = 3, 48
CASE_SECONDS = 1200  # the ten take 12 minutes; a rank whose peer has died may wait for it
HELD = ("master weights", "moments", "reference model", "teacher model")


@dataclass(frozen=True)
class Case:
    """A configuration of the trainer."""

    dtype: str
    rows: int
    lora_rank: int = 0
    checkpointing: bool = False
    num_ranks: int = 1
    kl_ctl: float = 0.0
    teacher: bool = False

    def __str__(self) -> str:
        parts = [f"{self.dtype}, {self.rows} tokens"]
        parts += [f"LoRA {self.lora_rank}"] if self.lora_rank else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["reference"] if self.kl_ctl else []
        parts += ["teacher"] if self.teacher else []
        return ", ".join([*parts, f"{self.num_ranks} ranks"] if self.num_ranks > 1 else parts)


CASES = (
    Case("bfloat16", 256),
    Case("bfloat16", 1024),
    Case("bfloat16", 2048),
    Case("float32", 256),
    Case("bfloat16", 256, checkpointing=True),
    Case("bfloat16", 256, kl_ctl=0.1),
    Case("bfloat16", 256, lora_rank=16),
    Case("bfloat16", 1024, lora_rank=16),
    Case("bfloat16", 256, num_ranks=2),
    Case("bfloat16", 256, lora_rank=16, num_ranks=2),
)


def config_of(case: Case, model: str) -> Config:
    return Config.model_validate(
        {
            "actor": {
                "path": model,
                "dtype": case.dtype,
                "max_tokens_per_micro_batch": case.rows,
                "gradient_checkpointing": case.checkpointing,
                "lora": {"rank": case.lora_rank},
            },
            "kl_ctl": case.kl_ctl,
            "teacher": {"path": model if case.teacher else ""},
            "data": {"train": {"path": "none"}},
            "sampling": {"max_new_tokens": 16},
            "rollout": {"engine": {"dtype": case.dtype}},
            "trainer": {"num_ranks": case.num_ranks},
            "weights": {"transport": "tensor"},
            "optimizer": {"lr": LR},
        }
    )


def measure(case: Case, model: str) -> dict[str, Any]:
    """In a process of its own: what one rank's update takes, and the estimate."""
    config = config_of(case, model)
    info = RankInfo.of(os.environ)
    ranks = Ranks(info) if case.num_ranks > 1 else None
    learner = Learner(config, ranks)
    shape = read_shape(model)
    tokens = range(FIRST_TOKEN, shape.vocab_size)
    few, full = (groups_of(rows, NUM_PACKS * case.num_ranks, tokens) for rows in (WARM_UP_ROWS, case.rows))

    def update(groups: Sequence[ScoredGroup]) -> None:
        if not learner.update(groups, version=0).changed:
            raise RuntimeError(f"the step of {case} changed nothing: expected a finite gradient")

    update(few)
    resident = resident_growth(partial(update, full))
    seen = counted(partial(update, full))
    need, host = trainer_need(config, shape, device="cpu"), host_need(config, shape)
    saved = sum(each.nbytes for each in learner.snapshot(Path("unused")).state.values())
    staged = staged_bytes(learner) if ranks is None else 0
    if ranks is not None:
        ranks.leave()
    return {
        "counted": asdict(seen),
        "resident": resident,
        "estimate": need.num_bytes,
        "held_estimate": sum(map(need.of, HELD)),
        "parts": {part.name: part.num_bytes for part in need.parts},
        "saved": (saved, host.of("copy for a checkpoint")),
        "staged": (staged, host.of("staged weights")),
    }


def staged_bytes(learner: Learner) -> int:
    """Of the copy that the transports tensor and nccl send from."""
    before = held_bytes()
    copy = WeightCopy(
        learner, published_format(learner.config), 2**28, lambda size: torch.empty(size, dtype=torch.uint8)
    )
    copy.fill()
    return held_bytes() - before


def run_case(case: Case, model: str, folder: Path) -> dict[str, Any]:
    """The measurement of rank 0; its log and that of other ranks are in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {**RETURN_FREED, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = ["-m", "benchmarks.memory_estimate", "--model", model, "--case", json.dumps(asdict(case))]
    processes = []
    try:
        for rank in range(case.num_ranks):
            own = {"RANK": str(rank), "WORLD_SIZE": str(case.num_ranks), "LOCAL_RANK": str(rank)}
            with (folder / f"rank-{rank}.log").open("w") as log:
                command = [sys.executable, *words, "--out", str(folder / f"{rank}.json")]
                processes.append(subprocess.Popen(command, env={**os.environ, **shared, **own}, stderr=log, cwd=ROOT))
        codes = [process.wait(CASE_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        log_end = (folder / "rank-0.log").read_text(encoding="utf-8")[-3000:]
        raise RuntimeError(f"{case}: exit codes {codes}; the end of the log of rank 0:\n{log_end}")
    found: dict[str, Any] = json.loads((folder / "0.json").read_text(encoding="utf-8"))
    return found


def table(results: Sequence[tuple[Case, dict[str, Any]]]) -> list[str]:
    lines = [
        "| Case | held, MiB | counted peak, MiB | estimate, MiB | estimate / counted | of what comes and goes | "
        "peak of the resident set, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, result in results:
        seen = result["counted"]
        moving = (result["estimate"] - result["held_estimate"]) / (seen["peak_bytes"] - seen["held_bytes"])
        lines.append(
            f"| {case} | {seen['held_bytes'] / MIB:.0f} | {seen['peak_bytes'] / MIB:.0f} | "
            f"{result['estimate'] / MIB:.0f} | {result['estimate'] / seen['peak_bytes']:.3f} | {moving:.3f} | "
            f"{result['resident'][1] / MIB:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimated against counted memory of a trainer's update.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--case", type=json.loads, help="run one case, given as JSON, in this process")
    parser.add_argument("--out", type=Path, help="file for the result of --case")
    arguments = parser.parse_args()
    if arguments.case is not None:
        arguments.out.write_text(json.dumps(measure(Case(**arguments.case), arguments.model)), encoding="utf-8")
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            results.append((case, run_case(case, arguments.model, Path(folder))))
            print(table(results)[-1], flush=True)
            print(json.dumps(results[-1][1]), file=sys.stderr, flush=True)
    print("\n".join(table(results)))
    for what in ("saved", "staged"):
        pairs = [(case, *result[what]) for case, result in results if result[what][0]]
        ratios = [estimate / seen for _, seen, estimate in pairs]
        print(f"{what}: estimate / counted bytes from {min(ratios):.4f} to {max(ratios):.4f} in {len(ratios)} cases")


if __name__ == "__main__":
    main()

"""What an open page costs the training that serves it: CPU seconds of the trainer's process, by turns.

    python -m benchmarks.view_beside                    # the demo, 60 steps; minutes, on a busy machine ten
    python -m benchmarks.view_beside --folder /data/b   # and keep the run there

Runs examples/demo and asks its trainer for refreshes, as a hundred open pages ask, during every other block of steps.
Of each block it reads the CPU seconds of the trainer's process (user and system, /proc) and solves by least squares

    CPU seconds of a block = a x steps + c x rows computed + b x refreshes

since a step costs more the more rows it computes, and these get fewer while the run learns. CPU seconds, not seconds of
the clock: other work of the machine makes a step longer, and hardly dearer. Prints b with its standard error, and what
part of a step an open page costs, which asks for a refresh every ten seconds.
"""

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import psutil
import yaml

from benchmarks.chaos.launch import ROOT, Launch
from penstock.records import RunRecords

DEMO = ROOT / "examples" / "demo" / "config.yaml"
NAME = "beside"
EPOCHS = 6  # of 10 steps
BLOCK_STEPS = 3
WARM_UP_STEPS = 4
TICK_SECONDS = 0.1  # a refresh at each, in blocks that are asked
PAGE_SECONDS = 10.0  # between two refreshes of one page
CURVES = (
    *("reward_mean", "statistics/reward_std", "seconds/step", "generation_seconds", "seconds/wait", "seconds/update"),
    *("seconds/push_wait", "seconds/commit", "staleness_mean", "staleness_max", "statistics/behaviour_kl"),
    *("statistics/entropy", "statistics/length_generated", "statistics/grad_norm", "statistics/loss"),
)


@dataclass(frozen=True)
class Mark:
    """The trainer's process when it had reported `num_steps`. num_asked: refreshes so far."""

    num_steps: int
    cpu_seconds: float
    num_asked: int


@dataclass(frozen=True)
class Fit:
    """CPU seconds of a refresh, with its standard error, and of a step that nobody asks."""

    refresh_seconds: float
    error_seconds: float
    step_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the run is kept; default: a temporary folder")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of 10 steps")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        demo = yaml.safe_load(DEMO.read_text())
        demo["run"] |= {"name": NAME, "root": str(folder / "runs")}
        demo |= {"total_train_epochs": arguments.epochs, "checkpoint": {"every_steps": 0}}
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(demo))
        launch = Launch(config, folder / "runs" / NAME, {})
        launch.start()
        try:
            marks = list(observed(launch))
        finally:
            launch.end()
        lines = list(RunRecords(launch.run_folder).steps())
        show(
            fit(marks, [line["statistics"]["num_rows"] for line in lines]),
            marks,
            lines[-1]["ended_at"] - lines[0]["ended_at"],
        )


def observed(launch: Launch) -> Iterator[Mark]:
    """A mark at the end of each block, while the trainer is asked in every other one."""
    num_asked, trainer, url = 0, None, None
    last = WARM_UP_STEPS - BLOCK_STEPS
    with httpx.Client(timeout=None) as client, contextlib.suppress(psutil.NoSuchProcess):
        while launch.exit_code() is None:
            steps = launch.num_steps()
            trainer = trainer or launch.victims("trainer").get("trainer")
            url = url or listening(launch.run_folder)
            if trainer is not None and url is not None:
                if steps >= last + BLOCK_STEPS:
                    last = steps
                    used = trainer.cpu_times()
                    yield Mark(steps, used.user + used.system, num_asked)
                if steps >= WARM_UP_STEPS and is_asked(last):
                    num_asked += asks(client, url)
            time.sleep(TICK_SECONDS)


def is_asked(first: int) -> bool:
    """Whether the trainer is asked during the block that begins after so many steps."""
    return (first - WARM_UP_STEPS) // BLOCK_STEPS % 2 == 1


def asks(client: httpx.Client, url: str) -> int:
    """One refresh of the view Learning; 0 if the trainer has just ended."""
    about = f"{url}/v1/view/runs/{NAME}"
    with contextlib.suppress(httpx.TransportError):
        for path in (f"{url}/v1/view/runs", about, f"{about}/evaluations"):
            client.get(path).raise_for_status()
        client.get(f"{about}/curves", params={"name": CURVES}).raise_for_status()
        return 1
    return 0


def listening(run_folder: Path) -> str | None:
    """Where the trainer is, as it tells Prometheus; None before it does."""
    with contextlib.suppress(FileNotFoundError):
        for each in json.loads(run_folder.with_name(f"{NAME}.targets.json").read_text()):
            if each["labels"]["job"].endswith("trainer"):
                return f"http://{each['targets'][0]}"
    return None


def fit(marks: Sequence[Mark], num_rows: Sequence[float]) -> Fit:
    """Least squares over the blocks between marks. num_rows: computed by each step."""
    rows = []
    for before, after in pairwise(marks):
        computed = sum(num_rows[before.num_steps : after.num_steps])
        rows.append((after.num_steps - before.num_steps, computed, after.num_asked - before.num_asked))
    inputs = np.array(rows, dtype=np.float64)
    cpu = np.diff([mark.cpu_seconds for mark in marks])
    costs, *_ = np.linalg.lstsq(inputs, cpu, rcond=None)
    left = cpu - inputs @ costs
    variance = float(left @ left) / max(1, len(rows) - inputs.shape[1])
    error = math.sqrt(variance * np.linalg.inv(inputs.T @ inputs)[2, 2])
    num_steps = inputs[:, 0].sum()
    alone = (inputs[:, :2] @ costs[:2]).sum() / num_steps
    return Fit(float(costs[2]), error, float(alone))


def show(found: Fit, marks: Sequence[Mark], seconds: float) -> None:
    num_steps = marks[-1].num_steps - marks[0].num_steps
    step = seconds / max(1, marks[-1].num_steps - 1)
    print(f"{num_steps} steps in {len(marks) - 1} blocks, {marks[-1].num_asked} refreshes, {step:.2f} s a step")
    print(f"CPU seconds of the trainer: {found.step_seconds:.2f} a step; a refresh ", end="")
    print(f"{1e3 * found.refresh_seconds:.1f} +- {1e3 * found.error_seconds:.1f} ms")
    share, error = (
        each * step / PAGE_SECONDS / found.step_seconds for each in (found.refresh_seconds, found.error_seconds)
    )
    print(f"an open page costs {100 * share:.2f} +- {100 * error:.2f} % of a step (ratio {1 + share:.4f})")


if __name__ == "__main__":
    main()

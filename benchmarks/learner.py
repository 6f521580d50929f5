"""Measures Penstock's learner against the plain way to train on the same batch, in one run.

Owns the order of the processes and the table. Invariant: the sides run in turns, each in processes of its own, never
both at once. Start it alone on a quiet machine, from the repository's root:

    .venv/bin/python -m benchmarks.learner
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import transformers

from benchmarks.gpu.machine import gpu_name, peak_tflops
from benchmarks.learner_cases import Case, ragged_case, short_case
from benchmarks.learner_side import relative_difference
from penstock.contracts import Dtype

SIDES = ("penstock", "plain")
# Freed blocks go back to the kernel at once, so the resident set is what is in use.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Result:
    """One side: its seconds and peaks by case."""

    seconds: dict[str, float]
    loss_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    num_parameters: int


def run_side(side: str, measure: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.learner_side", side, "--measure", measure, "--folder", str(folder)]
    for name in ("model", "dtype", "prompts", "micro_batch", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MALLOC_", "KMP_"))}
    added = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=clean | added | (RETURN_FREED if measure == "memory" else {}))
    if side == "sampler":
        return {}
    found: dict[str, Any] = json.loads((folder / side / f"{measure}.json").read_text(encoding="utf-8"))
    return found


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, Result], dict[str, float]]:
    """The results of both sides, and by case how much their gradients differ."""
    run_side("sampler", "time", arguments, folder)
    times: dict[str, list[dict[str, list[float]]]] = {side: [] for side in SIDES}
    for repeat in range(arguments.repeats):
        for side in SIDES if repeat % 2 == 0 else SIDES[::-1]:
            times[side].append(run_side(side, "time", arguments, folder)["seconds"])
            print(f"{side}, run {repeat + 1}: {_shown(times[side][-1])}", flush=True)
    results = {}
    for side in SIDES:
        memory = run_side(side, "memory", arguments, folder)
        seconds = {name: median([value for each in times[side] for value in each[name]]) for name in times[side][0]}
        results[side] = Result(seconds, memory["loss_bytes"], memory["peak_bytes"], memory["num_parameters"])
    return results, {name: _difference(folder, name) for name in results["plain"].seconds}


def _shown(seconds: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {' '.join(f'{value:.2f}' for value in values)} s" for name, values in seconds.items())


def _difference(folder: Path, name: str) -> float:
    ours, plain = (torch.load(folder / side / f"{name}.pt") for side in SIDES)
    return relative_difference(ours, plain)


def table(results: dict[str, Result], differences: dict[str, float], cases: list[Case]) -> str:
    """Markdown; the last column is the plain value divided by Penstock's."""
    lines = ["| Batch | | Penstock | plain | plain / Penstock |", "| --- | --- | ---: | ---: | ---: |"]
    for case in cases:
        ours, plain = (results[side] for side in SIDES)
        rows: list[tuple[str, str, Mapping[str, float], Mapping[str, float], float]] = [
            ("seconds a step", "{:.2f}", ours.seconds, plain.seconds, 1.0),
            ("ms per trained token", "{:.2f}", ours.seconds, plain.seconds, 1e3 / case.num_loss_tokens),
            ("loss part's peak memory, MiB", "{:.0f}", ours.loss_bytes, plain.loss_bytes, 2.0**-20),
            ("peak memory, MiB", "{:.0f}", ours.peak_bytes, plain.peak_bytes, 2.0**-20),
        ]
        for title, form, left, right, scale in rows:
            values = (left[case.name] * scale, right[case.name] * scale)
            cells = [*(form.format(value) for value in values), f"{values[1] / values[0]:.2f}"]
            lines.append(f"| {case.name} | {title} | {' | '.join(cells)} |")
        if (peak := peak_tflops(gpu_name())) is not None:
            flops = 6 * ours.num_parameters * case.num_sequence_tokens
            shares = [flops / each.seconds[case.name] / (peak * 1e12) for each in (ours, plain)]
            lines.append(
                f"| {case.name} | model FLOPs utilisation | {shares[0]:.1%} | {shares[1]:.1%} "
                f"| {shares[1] / shares[0]:.2f} |"
            )
        lines.append(f"| {case.name} | relative difference of the gradients | {differences[case.name]:.1e} | | |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Compare Penstock's learner with the plain way.")
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="default: %(default)s")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16" if cuda else "float32")
    parser.add_argument(
        "--prompts", type=int, default=64 if cuda else 2, help="prompts of the ragged batch (default: %(default)s)"
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=8 if cuda else 4,
        help="sequences per micro-batch of the plain way (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not (Path(arguments.model) / "config.json").exists():
        sys.exit(f"learner: {arguments.model} is not there: expected a model's folder; run `make demo` or set --model")
    started = time.monotonic()
    cases = [ragged_case(arguments.prompts), short_case()]
    load = os.getloadavg()[0]
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {arguments.dtype}, "
        f"{arguments.threads} thread(s); load before: {load:.2f}" + (" (not quiet: expect noise)" if load > 0.5 else "")
    )
    for case in cases:
        print(f"{case.name}: {case.num_loss_tokens} trained tokens, {case.num_sequence_tokens} with the prompts")
    with tempfile.TemporaryDirectory(prefix="penstock-learner-") as folder:
        results, differences = measure(arguments, Path(folder))
    print(f"\n{table(results, differences, cases)}\n\nMeasured in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()

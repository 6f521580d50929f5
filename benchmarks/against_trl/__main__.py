"""Runs Penstock's demo and the same task in TRL one after the other on the same cores, and compares them.

Owns the environment in which each side runs, and runs/against-trl/. Invariant: never both at once; each with the
threads and the allocator that suit it best. Start it alone on a quiet machine, from the repository's root:

    .venv/bin/python -m benchmarks.against_trl
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.against_trl.cpu_sampler import CpuSampler
from benchmarks.against_trl.figures import Figures, figures_of, penstock_side, table, trl_side

CONFIG = "examples/demo/config.yaml"
MODEL = Path("models/SmolLM2-135M-Instruct")
TRAIN, HELDOUT = "examples/demo/addition_train.jsonl", "examples/demo/addition_heldout.jsonl"
EVAL_EVERY_STEPS = 5  # twice as often as the demo, for a finer curve
OUT = Path("runs/against-trl")
PENSTOCK_RUN = "against-trl-penstock"
TRIAL_STEPS = 4
TRL_PYTHON = Path(".venv-trl/bin/python")
TRL_READY = Path(".venv-trl/.ready")
REQUIREMENTS = "benchmarks/against_trl/trl-requirements.txt"
PENSTOCK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # those of the Makefile
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Freed memory stays with the process: giving it back and faulting it in anew costs seconds a step.
TRL_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


def install_trl() -> None:
    """Create .venv-trl once. torch comes first, in Penstock's build, so that pip pulls in no other."""
    if TRL_READY.exists():
        return
    print("TRL's environment (.venv-trl): installing; 1 to 5 minutes the first time.", flush=True)
    if not TRL_PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", ".venv-trl"], check=True)
    pip = [str(TRL_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch_version = importlib.metadata.version("torch")
    subprocess.run([*pip, "--constraint", REQUIREMENTS, f"torch=={torch_version}"], check=True)
    subprocess.run([*pip, "--constraint", REQUIREMENTS, "trl"], check=True)
    TRL_READY.touch()


def run(command: list[str], added: dict[str, str]) -> CpuSampler:
    """Run one side to its end; returns its CPU samples."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MALLOC_", "GOMP_", "KMP_"))
    }
    with subprocess.Popen(command, env={**clean, **added}) as process, CpuSampler(process.pid) as sampler:
        code = process.wait()
    if code != 0:
        sys.exit(f"against_trl: {' '.join(command)} ended with {code}: expected 0; its output is above")
    return sampler


def run_penstock(steps: int, group_size: int, seed: int) -> Figures:
    command = [str(Path(sys.executable).parent / "penstock"), "launch", "local", "--config", CONFIG]
    command += ["--run.name", PENSTOCK_RUN, "--run.seed", str(seed), "--run.max_steps", str(steps)]
    command += ["--actor.group_size", str(group_size), "--eval.every_steps", str(EVAL_EVERY_STEPS)]
    sampler = run(command, {**PENSTOCK_ENVIRONMENT, **OFFLINE})
    folder = Path("runs") / PENSTOCK_RUN
    return figures_of(penstock_side(_lines(folder / "steps.jsonl"), _lines(folder / "evals.jsonl")), sampler)


def fastest_threading(cores: int, group_size: int, seed: int) -> dict[str, str]:
    """The OpenMP settings that are fastest for tuned TRL on this machine, found by short runs."""
    candidates: list[dict[str, str]] = [{"OMP_NUM_THREADS": "1"}]
    if cores > 1:
        candidates += [{"OMP_NUM_THREADS": str(cores)}, {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "passive"}]
    trials = [run_trl("code", TRIAL_STEPS, group_size, seed, each).seconds_per_step for each in candidates]
    for each, seconds in zip(candidates, trials, strict=True):
        print(f"Trial: TRL with {each}: {seconds:.2f} s a step", flush=True)
    return candidates[trials.index(min(trials))]


def run_trl(level: str, steps: int, group_size: int, seed: int, threading: dict[str, str]) -> Figures:
    result, sampler = train_trl(level, steps, group_size, seed, threading)
    return figures_of(trl_side(result), sampler)


def train_trl(
    level: str, steps: int, group_size: int, seed: int, threading: dict[str, str]
) -> tuple[dict[str, Any], CpuSampler]:
    """What `trl_demo` writes of its run, and what the run used."""
    out = OUT / f"trl-{level}.json"
    command = [str(TRL_PYTHON), "-m", "benchmarks.against_trl.trl_demo", "--level", level, "--model", str(MODEL)]
    command += ["--train", TRAIN, "--heldout", HELDOUT, "--steps", str(steps), "--seed", str(seed)]
    command += ["--group-size", str(group_size), "--eval-every-steps", str(EVAL_EVERY_STEPS), "--out", str(out)]
    tuned = {} if level == "installed" else {**threading, **TRL_ALLOCATOR}
    sampler = run(command, {**tuned, **OFFLINE})
    return json.loads(out.read_text(encoding="utf-8")), sampler


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare Penstock's demo with the same task in TRL.")
    parser.add_argument("--steps", type=int, default=40, help="steps of each side (default: %(default)s)")
    parser.add_argument(
        "--group-size", type=int, default=24, help="completions of each of 8 prompts (default: %(default)s, the demo's)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cores", type=int, default=2, help="cores that each side gets (default: %(default)s)")
    parser.add_argument(
        "--trl",
        nargs="*",
        default=["code", "settings:10", "installed:3"],
        metavar="LEVEL[:STEPS]",
        help="TRL's levels of tuning, each a run of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--trl-threads", type=int, help="with passive waiting; default: what was fastest in short trials"
    )
    parser.add_argument("--without-penstock", action="store_true", help="only TRL")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not (MODEL / ".complete").exists():
        sys.exit(f"against_trl: {MODEL} is not there: expected the demo's model; run `make demo` first")
    install_trl()
    OUT.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))[: arguments.cores]
    os.sched_setaffinity(0, cores)  # both sides inherit it
    load = os.getloadavg()[0]
    print(f"Cores {cores}; load before: {load:.2f}" + (" (not quiet: expect noise)" if load > 0.5 else ""), flush=True)
    started = time.monotonic()
    steps, group_size, seed = arguments.steps, arguments.group_size, arguments.seed
    results = [] if arguments.without_penstock else [run_penstock(steps, group_size, seed)]
    if arguments.trl_threads:
        threading = {"OMP_NUM_THREADS": str(arguments.trl_threads), "OMP_WAIT_POLICY": "passive"}
    else:
        threading = fastest_threading(len(cores), group_size, seed)
    for each in arguments.trl:
        level, _, own_steps = each.partition(":")
        results.append(run_trl(level, int(own_steps or steps), group_size, seed, threading))
    text = table(results)
    (OUT / "result.md").write_text(text + "\n", encoding="utf-8")
    (OUT / "result.json").write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n", encoding="utf-8")
    print(f"\n{text}\n\nMeasured in {time.monotonic() - started:.0f} s; kept in {OUT}/.")


if __name__ == "__main__":
    main()

"""Full runs on the GPU: the demo, longer sums, and GSM8K if it was carried; and how far each is from ideal.

Owns the configurations of the runs and the reading of what they write. The gap to ideal is that of `summary.json` (step
time over the longer of generation and training time, minus 1); here it is made of the same lines, `steps.jsonl`, so a
run that was stopped in time has one too. A step's phases show what the gap consists of.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from benchmarks.chaos.model import make_tiny_model
from benchmarks.gpu.engine import engine_section, has_engine
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Recorder
from penstock.records.figures import Timing, without_warm_up
from penstock_trainer.telemetry.progress import Progress

ROOT = Path(__file__).parents[2]
DEMO, GSM8K = ROOT / "examples" / "demo" / "config.yaml", ROOT / "examples" / "gsm8k" / "config.yaml"
RUN_SECONDS = 90.0  # below this a run does not leave its warm-up behind
STOP_SECONDS = 45.0  # to end in order
NUM_SUMS, NUM_HELD_OUT = 2048, 100
CPU_STEPS = 5
CPU_ROWS, CPU_HELD_OUT = range(4 * CPU_STEPS), range(4 * CPU_STEPS, 4 * CPU_STEPS + 20)


@dataclass(frozen=True)
class Task:
    """A run: its name and its configuration."""

    name: str
    document: dict[str, Any]


def run(options: Options, record: Recorder) -> None:
    if not has_engine(options, record, "loop"):
        return
    if options.model is None and not options.cpu:
        record.skip("loop", "no model with a tokenizer; give --model")
        return
    with tempfile.TemporaryDirectory(prefix="penstock-loop-") as folder:
        model = options.model or Path(folder) / "model"
        if options.model is None:
            make_tiny_model(model)
        chosen = list(tasks(options, model))
        if options.gsm8k is None:
            record.skip("gsm8k", "no data; give --gsm8k")
        for number, task in enumerate(chosen):
            if record.has_time(task.name, 20 if options.cpu else RUN_SECONDS):
                seconds = record.seconds_left / (len(chosen) - number)
                measure(options, record, task, max(10.0, seconds - STOP_SECONDS))


def tasks(options: Options, model: Path) -> Iterator[Task]:
    """In the order of their length."""
    demo = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    for split in ("train", "eval"):
        demo["data"][split]["path"] = str(ROOT / demo["data"][split]["path"])
    if options.cpu:
        sizes: dict[str, Any] = {
            "actor": {"group_size": 4},
            "run": {"max_steps": CPU_STEPS},
            "data": {
                "batch_size": 4,
                "train": {"path": written(options, "patterns", patterns(CPU_ROWS))},
                "eval": {"path": written(options, "patterns-heldout", patterns(CPU_HELD_OUT))},
            },
            "reward": {"functions": {"format_regex": 1.0}},
        }
        yield Task("demo", placed(options, "demo", merged(demo, sizes), model))
        return
    yield Task("demo", placed(options, "demo", demo, model))
    changes: dict[str, Any] = {
        "actor": {"group_size": 16},
        "data": {
            "batch_size": 32,
            "train": {"path": written(options, "sums", sums(0, NUM_SUMS))},
            "eval": {"path": written(options, "sums-heldout", sums(1, NUM_HELD_OUT))},
        },
        "sampling": {"max_new_tokens": 8},
        "rollout": {"engine": {"max_running_requests": 1024, "max_total_tokens": 0, "context_length": 512}},
    }
    yield Task("sums", placed(options, "sums", merged(demo, changes), model))
    if options.gsm8k is not None:
        gsm8k = yaml.safe_load(GSM8K.read_text(encoding="utf-8"))
        for split in ("train", "eval"):
            gsm8k["data"][split]["path"] = str(options.gsm8k)
        yield Task("gsm8k", placed(options, "gsm8k", gsm8k, model))


def placed(options: Options, name: str, document: dict[str, Any], model: Path) -> dict[str, Any]:
    """The document for this machine."""
    changes: dict[str, Any] = {
        "run": {"name": name, "root": str((options.out / "runs").absolute()), "existing": "replace"},
        "actor": {"path": str(model), "dtype": options.dtype},
        "rollout": {"engine": engine_section(options)},
    }
    return merged(document, changes)


def merged(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """`left` with the values of `right`, section by section."""
    both = {
        key: merged(left[key], value) if isinstance(value, dict) and isinstance(left.get(key), dict) else value
        for key, value in right.items()
    }
    return {**left, **both}


def written(options: Options, name: str, rows: Iterable[dict[str, Any]]) -> str:
    """The path of a file with the rows."""
    path = options.out.absolute() / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def patterns(numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Tasks that a random model of letters solves now and then: a digit among four characters."""
    for number in numbers:
        yield {"prompt": f"{number}+1=", "answer": "", "metadata": {"pattern": "[0-4]"}}


def sums(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """A calculator's tasks: sums and differences of three numbers below 100, with examples before them."""
    random = Random(seed)
    for _ in range(count):
        first, second, third = (random.randrange(100) for _ in range(3))
        prompt = f"12+30-7=35\n58-9+41=90\n{first}+{second}-{third}="
        yield {"prompt": prompt, "answer": str(first + second - third)}


def measure(options: Options, record: Recorder, task: Task, seconds: float) -> None:
    """Run it for at most so long, and read what it has written."""
    path = options.out / f"{task.name}.yaml"
    path.write_text(yaml.safe_dump(task.document), encoding="utf-8")
    command = [sys.executable, "-m", "penstock_launch", "launch", "local", "--config", str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"}
    log, started_at = options.out / f"{task.name}.log", time.time()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait(seconds)
            stopped = False
        except subprocess.TimeoutExpired:
            stopped = True
            process.send_signal(signal.SIGTERM)
        finally:
            code = _ended(process)
    if code != 0 and not stopped:
        record.figure(task.name, "exit code", code, limit=0, note=f"see {log}")
    read(record, task.name, options.out / "runs" / task.name, started_at)


def _ended(process: "subprocess.Popen[bytes]") -> int:
    """Its exit code; a launcher that does not end in order is killed, and its services end with it."""
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def read(record: Recorder, task: str, folder: Path, started_at: float) -> None:
    """The figures of a run's folder; `started_at`: Unix seconds of the launch."""
    if not (folder / "steps.jsonl").exists():
        record.skip(task, f"no step was trained in {time.time() - started_at:.0f} s; see {task}.log")
        return
    progress = Progress(folder)
    lines = list(without_warm_up(progress.step_lines()))
    timing = Timing((line.seconds, line.generation_seconds) for line in lines)
    first_started_at = next((line.started_at for line in progress.step_lines()), started_at)
    record.figure(task, "steps", progress.num_steps)
    record.figure(task, "until the first step", first_started_at - started_at, "s")
    generation = sum(line.generation_seconds for line in lines)
    per_step = timing.mean_seconds
    for phase, value in per_step.items():
        record.figure(task, f"a step: {phase}", value, "s")
    record.figure(task, "a step: generation (at the same time)", generation / len(lines), "s")
    if generation:
        tokens = sum(line.generated_tokens for line in lines)
        record.figure(task, "generated while generating", tokens / generation, "tokens/s")
        record.figure(task, "generated", tokens / sum(line.seconds["step"] for line in lines), "tokens/s")
    if (gap := timing.gap_to_ideal) is not None:
        record.figure(task, "gap to ideal", gap)
    record.figure(task, "reward, mean of the last 5 steps", progress.reward_average or 0.0)
    # Without a figure, every reward of the evaluation has failed.
    evals = [line for line in sorted(progress.evals(), key=lambda line: line["steps"]) if line["accuracy"] is not None]
    if evals:
        record.figure(task, "held-out accuracy before", evals[0]["accuracy"])
        record.figure(task, "held-out accuracy at the end", evals[-1]["accuracy"])
    not_finite = sum(not line.is_finite for line in progress.step_lines())
    record.figure(task, "steps that are not finite", not_finite, limit=0)

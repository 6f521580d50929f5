"""Two steps of the GSM8K example on real rows with SmolLM2 and SGLang, for the test of each launcher.

The rows in tests/gsm8k are the first of GSM8K's own files (Cobbe et al., arXiv 2110.14168; MIT, tests/gsm8k/LICENSE).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.config import Config
from penstock.config.load import load_config
from penstock.config.shown import as_yaml, changed
from tests.real_model import real_model
from tests.sglang_environment import find_sglang_python

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "gsm8k"
ROWS = ROOT / "tests" / "gsm8k"
NUM_STEPS, BATCH_SIZE, GROUP_SIZE, NUM_HELD_OUT = 2, 2, 2, 2
RUN_SECONDS = 1200.0  # it takes a minute on an idle machine


def small_run(folder: Path, name: str, **sections: Mapping[str, Any]) -> Config:
    """The example's configuration with folders of this machine and as little work as is still training."""
    sizes = {
        "run.name": name,
        "run.root": folder / "runs",
        "run.max_steps": NUM_STEPS,
        "run.stall_seconds": int(RUN_SECONDS),
        "actor.path": real_model(),
        "actor.group_size": GROUP_SIZE,
        "data.batch_size": BATCH_SIZE,
        "data.train.path": ROWS,
        "data.eval.path": ROWS,
        "data.eval.size": NUM_HELD_OUT,
        "sampling.max_new_tokens": 16,
        "reward.modules_path": EXAMPLE,
        "rollout.engine.python": find_sglang_python(),
        "rollout.engine.max_total_tokens": 4096,
        "rollout.engine.max_running_requests": 8,
        "rollout.engine.memory_fraction": 0.95,  # of what is free: other tests may leave little
    }
    files = [word for name in ("config.yaml", "cpu.yaml") for word in ("--config", str(EXAMPLE / name))]
    words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    config = load_config([*files, *words], {})
    return Config.model_validate({**config.model_dump(), **sections})


def write_small_run(folder: Path, name: str, **sections: Mapping[str, Any]) -> Path:
    """The file of `small_run`."""
    path = folder / "gsm8k.yaml"
    path.write_text(as_yaml(changed(small_run(folder, name, **sections))), encoding="utf-8")
    return path


def require_two_steps(folder: Path) -> None:
    """Both steps were trained on GSM8K's rows, and held-out rows were answered before and after."""
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == list(range(NUM_STEPS))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["exit"]["code"] == 0
    assert summary["tickets"]["trained"] == NUM_STEPS * BATCH_SIZE
    assert summary["completions"]["num"] == NUM_STEPS * BATCH_SIZE * GROUP_SIZE
    assert summary["completions"]["failed"] == 0
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    assert [(line["steps"], line["num_prompts"], line["num_failed"]) for line in evals] == [
        (0, NUM_HELD_OUT, 0),
        (NUM_STEPS, NUM_HELD_OUT, 0),
    ]
    asked = [sample["prompt"] for sample in summary["samples_before"]]
    answered = [sample["completion"] for sample in summary["samples_before"]]
    held_out = [json.loads(line)["question"] for line in (ROWS / "test.jsonl").read_text().splitlines()]
    assert asked == held_out[:NUM_HELD_OUT]
    assert all(any(letter.isalpha() for letter in text) for text in answered)

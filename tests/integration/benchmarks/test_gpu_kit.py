"""The parts of the GPU kit that need an engine, in their form for a CPU, with a real SGLang and a tiny model."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.record import lines_of
from tests.integration.rollout.sglang_pair import PYTHON
from tests.patience import START_SECONDS

ROOT = Path(__file__).parents[3]
MINUTES = 2 * START_SECONDS / 60

pytestmark = [pytest.mark.slow, pytest.mark.redis, pytest.mark.timeout(6 * START_SECONDS)]


def run_part(part: str, folder: Path) -> dict[tuple[str, str], Any]:
    """Figures by case and name; the part has ended by itself."""
    command = [sys.executable, "-m", "benchmarks.gpu", part, "--cpu", "--out", str(folder), "--minutes", str(MINUTES)]
    done = subprocess.run(
        [*command, "--engine-python", str(PYTHON)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=5 * START_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = lines_of(folder, part)
    assert lines[-1]["state"] == "done"
    found = {(line["case"], line["name"]): line["value"] for line in lines if line["kind"] == "figure"}
    assert all(value is not None and math.isfinite(value) for value in found.values())
    return found


def test_the_service_beside_bare_sglang(tmp_path: Path) -> None:
    found = run_part("rollout", tmp_path)
    load = "16 completions at once, 16 new tokens"
    for form in ("bare", "bare, log-probabilities", "bare, log-probabilities, groups", "service"):
        assert found[f"{load}, {form}", "tokens per second"] > 0
    for other in ("bare", "bare, log-probabilities", "bare, log-probabilities, groups"):
        assert found[load, f"service / {other}"] > 0
    assert 0 <= found[load, "slots idle"] < 1
    assert 0 <= found[load, "slots held by the finished"] < 1
    assert found[f"{load}, service", "CPU of queue"] >= 0  # a short load may use less than one tick


def test_pushes_by_each_transport(tmp_path: Path) -> None:
    found = run_part("pushes", tmp_path)
    for transport in ("disk", "nccl", "tensor"):
        case = f"tiny, {transport}"
        assert found[case, "total"] == pytest.approx(found[case, "stage"] + found[case, "push"])
        assert found[case, "push / raw"] > 0
        assert found[case, "pause that a completion shows"] >= 0
        assert found[case, "paused"] <= found[case, "push"]


def test_a_full_run_and_its_gap(tmp_path: Path) -> None:
    found = run_part("loop", tmp_path)
    assert found["demo", "steps"] == 5
    assert found["demo", "gap to ideal"] > -1
    assert found["demo", "a step: step"] > 0
    assert found["demo", "a step: forward_backward"] > 0
    assert found["demo", "reward, mean of the last 5 steps"] > 0
    assert found["demo", "steps that are not finite"] == 0
    assert (tmp_path / "runs" / "demo" / "summary.json").exists()

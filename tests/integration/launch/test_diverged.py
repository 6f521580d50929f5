"""A run whose training diverges ends with the reason, and leaves no model that is broken: the real processes.

The engine is the pure one, which knows nothing of the model, and so there is no canary.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock_trainer.checkpoints.tensors import read_all
from tests.integration.launch.user_commands import UserCommands, assert_launch_ends

pytestmark = [pytest.mark.redis, pytest.mark.slow]

NON_FINITE_EXIT = 8

# Unlike SPREAD, it gives the groups of the first step a gradient.
SUM = "def total(prompt, completion, answer, metadata):\n    return float(sum(map(ord, completion)) % 5)\n"


@pytest.fixture
def setup(setup: UserCommands) -> UserCommands:
    setup.embed_queue()
    setup.use_pure_engine()
    setup.score_by("total", SUM)
    setup.document["checkpoint"] = {"every_steps": 1, "keep": 100}
    return setup


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def assert_no_broken_model(folder: Path) -> None:
    assert not list(folder.glob("final*"))
    for path in (folder / "checkpoints").glob("[0-9]*"):
        state = read_all(path)
        assert all(bool(torch.isfinite(each).all()) for each in state.values() if each.is_floating_point()), path


def assert_summary(folder: Path, *texts: str) -> None:
    ended = json.loads((folder / "summary.json").read_text())["exit"]
    assert ended["code"] == NON_FINITE_EXIT
    assert ended["reason"] == "trainer ended (exit code 8): training has diverged"
    for text in texts:
        assert text in "\n".join(ended["lines"])


def test_weights_that_are_not_finite_end_the_run_before_they_are_pushed(setup: UserCommands) -> None:
    setup.document["optimizer"] = {"lr": 3e38}
    reason = "such values: expected finite weights"
    assert_launch_ends(setup.launch(), NON_FINITE_EXIT, "non_finite: ", reason, "optimizer.lr")
    folder = setup.run_folder
    assert_summary(folder, reason)
    assert_no_broken_model(folder)
    log = (folder / "logs" / "trainer.log").read_text()
    assert "version 0-" in log
    assert "version 1-" not in log  # is pushed


def test_steps_in_a_row_without_a_finite_gradient_end_the_run(setup: UserCommands) -> None:
    """The first step makes weights that still give numbers, and no gradient."""
    setup.document["optimizer"] = {"lr": 1e30, "max_non_finite_steps": 3}
    reason = "the last 3 steps had a loss or gradient that is not finite (step 4: "
    assert_launch_ends(setup.launch(), NON_FINITE_EXIT, "non_finite: ", reason, "optimizer.max_non_finite_steps 3")
    folder = setup.run_folder
    assert_summary(folder, reason)
    assert_no_broken_model(folder)
    figures = [each["statistics"] for each in steps(folder)]
    assert [math.isfinite(each["loss"]) and math.isfinite(each["grad_norm"]) for each in figures] == [
        True,
        *[False] * 3,
    ]
    log = (folder / "logs" / "trainer.log").read_text()
    assert "step 2 is not finite" in log

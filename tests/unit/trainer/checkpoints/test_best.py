"""Which checkpoint is the best, and which of them stay."""

from pathlib import Path
from typing import Any

import pytest

from penstock.config import EvalSection
from penstock.contracts.ledger import CheckpointRecord
from penstock_trainer.checkpoints.best import KeepBest, best_checkpoint
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from tests.unit.common.records.test_best import line

RECORDS = [CheckpointRecord(steps, f"{steps:08d}.1") for steps in (0, 8, 16, 24)]


@pytest.mark.parametrize(
    ("lines", "section", "steps"),
    [
        ([line(8, 0.5), line(16, 0.75), line(24, 0.5)], {}, 16),
        ([line(8, 0.5), line(16, 0.5)], {}, 8),
        ([line(0, 1.0), line(8, 0.5)], {}, 8),  # before the first step: actor.path
        ([line(8, 0.5), line(12, 1.0)], {}, 8),  # no checkpoint
        ([line(8, 0.5), line(16, 1.0, newest_version=17)], {}, 8),  # weights changed meanwhile
        ([line(8, 0.5, reward_mean=0.5), line(16, 0.25, reward_mean=0.75)], {"best_metric": "reward"}, 16),
        ([line(8, 0.5), line(16, 0.5, set="hard"), line(24, 1.0, set="hard")], {"best_set": "hard"}, 24),
        ([], {}, None),
    ],
)
def test_the_best_checkpoint(lines: list[dict[str, Any]], section: dict[str, Any], steps: int | None) -> None:
    found = best_checkpoint(RECORDS, lines, EvalSection.model_validate(section))
    assert (None if found is None else (found.record.steps, found.evaluation.steps)) == (steps and (steps, steps))


def test_the_best_and_those_whose_evaluation_has_not_ended_stay_beside_the_newest(tmp_path: Path) -> None:
    checkpoints, lines, waiting = Checkpoints(tmp_path, keep=1), list[dict[str, Any]](), set[int]()
    best = KeepBest(EvalSection(), lambda: lines, lambda: waiting)
    committed: list[CheckpointRecord] = []

    def write(steps: int) -> list[int]:
        """The steps of the checkpoints that are left, and the oldest one that a resume may begin with."""
        meta = CheckpointMeta(steps, steps, 1, 0, ())
        committed.append(checkpoints.complete(checkpoints.begin(meta), meta))
        assert checkpoints.prune(committed, best.names(committed)) == steps
        return [int(name.split(".")[0]) for name in checkpoints.names()]

    waiting = {8}
    assert write(8) == [8]
    assert write(10) == [8, 10]
    lines.append(line(8, 0.75))
    waiting = {16}
    assert write(16) == [8, 16]
    assert write(20) == [8, 16, 20]
    lines.append(line(16, 0.5))
    waiting = {24}
    assert write(24) == [8, 24]
    lines.append(line(24, 0.875))
    waiting = set()
    assert write(30) == [24, 30]

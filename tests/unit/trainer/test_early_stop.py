"""When a run ends early, and that a later life keeps to it."""

from typing import Any

import pytest

from penstock.config import EvalSection
from penstock.contracts.ledger import (
    EarlyStopRecord,
    Record,
    RunRecord,
    StepRecord,
    decode_record,
    encode_record,
    replay,
)
from penstock_trainer.early_stop import EarlyStop
from tests.unit.common.records.test_best import line


class Ledger:
    """The lines of a run, its number of steps, and its decisions."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.steps = 0
        self.records: list[EarlyStopRecord] = []

    async def append(self, record: EarlyStopRecord) -> None:
        self.records.append(record)

    def life(self, before: EarlyStopRecord | None = None, **section: Any) -> EarlyStop:
        made = EarlyStop(
            EvalSection.model_validate({"patience": 2, **section}), lambda: self.lines, lambda: self.steps, self.append
        )
        made.restore(before)
        return made


async def test_a_run_ends_after_as_many_evaluations_without_a_better_one() -> None:
    run = Ledger()
    life = run.life(best_set="hard", best_metric="reward", min_delta=0.125)
    for steps, reward in ((0, 0.25), (8, 0.5), (16, 0.625)):
        run.lines += [line(steps, 1.0 - steps / 32), line(steps, 0.0, set="hard", reward_mean=reward)]
        run.steps = steps + 3  # it has trained on meanwhile
        assert not await life.decided()
    run.lines.append(line(24, 0.0, set="hard", reward_mean=0.5))
    run.steps = 27
    assert await life.decided()
    assert await life.decided()
    assert run.records == [EarlyStopRecord(27, "hard", "reward", 0.5, 8, 2, 0.125)]


async def test_without_patience_a_run_goes_on() -> None:
    run = Ledger()
    run.steps, run.lines = 40, [line(8 * n, 0.5) for n in range(6)]
    assert not await run.life(patience=0).decided()
    assert run.records == []


@pytest.mark.parametrize(
    ("patience", "steps", "ends"),
    [(2, 27, True), (1, 27, True), (4, 27, False), (0, 27, False), (4, 28, False)],
)
async def test_a_later_life_keeps_to_the_end_unless_it_has_more_patience(patience: int, steps: int, ends: bool) -> None:
    """Also if the evaluation of the final weights is the best of all."""
    run = Ledger()
    run.steps = steps
    run.lines = [line(8, 0.75), line(16, 0.5), line(24, 0.5), line(27, 1.0)]
    before = EarlyStopRecord(27, "main", "accuracy", 0.75, 8, 2, 0.0)
    assert await run.life(before, patience=patience).decided() == ends
    assert run.records == []


async def test_a_life_that_ended_before_it_recorded_its_decision_makes_it_again() -> None:
    run = Ledger()
    run.steps, run.lines = 25, [line(8, 0.75), line(16, 0.5), line(24, 0.5)]
    assert await run.life(None).decided()
    assert [record.steps for record in run.records] == [25]


def test_the_ledger_has_the_last_decision() -> None:
    records: list[Record] = [
        RunRecord("d", 4, 2, 2, 0),
        StepRecord(0, (0, 1), "f", "d"),
        EarlyStopRecord(1, "main", "accuracy", 0.5, 0, 1, 0.0),
        EarlyStopRecord(3, "main", "accuracy", 0.5, 0, 3, 0.0),
    ]
    state = replay([decode_record(encode_record(each)) for each in records])
    assert state.early_stop == records[-1]
    assert replay(records[:2]).early_stop is None

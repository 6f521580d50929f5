"""When a run ends early, and that a later life keeps to it."""

import itertools
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
from penstock.contracts.vocabulary import DropReason
from penstock.errors import StallError
from penstock_trainer.early_stop import EarlyStop, described
from tests.unit.common.records.test_best import line
from tests.unit.common.tickets.ticket_books import make_book


class Ledger:
    """The lines of a run, its number of steps, and its decisions."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.steps = 0
        self.records: list[EarlyStopRecord] = []
        self.rewards: tuple[float, float] | None = None
        self.book = make_book(batch_size=1, max_staleness=9, num_draws=100)

    async def append(self, record: EarlyStopRecord) -> None:
        self.records.append(record)

    def life(self, before: EarlyStopRecord | None = None, **section: Any) -> EarlyStop:
        made = EarlyStop(
            EvalSection.model_validate({"patience": 2, **section}),
            self.book,
            lambda: self.lines,
            lambda: self.rewards,
            lambda: self.steps,
            self.append,
        )
        made.restore(before)
        return made

    def end_without_gradient(self, *right: float) -> None:
        """Ten tickets, all of whose completions have this reward; of several, each in turn."""
        for number, reward in zip(self.book.issue()[:10], itertools.cycle(right), strict=False):
            self.book.drop(number, DropReason.DEGENERATE, right=reward)


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


async def test_a_run_ends_once_all_completions_are_right() -> None:
    run = Ledger()
    run.steps, run.rewards = 38, (0.0, 1.0)
    life = run.life(success=0.75)
    assert not await life.decided()
    run.end_without_gradient(1.0)
    assert await life.decided()
    assert await life.decided()
    record = EarlyStopRecord(38, metric="reward", best=1.0, best_steps=38, solved_tickets=10, success=0.75)
    assert run.records == [record]
    assert run.book.issue() == []
    assert described(record) == (
        "ended after 38 steps, solved: in the last 10 tickets no reward was below 1, the highest of the run, which "
        "reaches eval.success (0.75); no group had a gradient"
    )


@pytest.mark.parametrize(
    ("rewards", "why"),
    [
        (None, "no step: nothing is known of the reward"),
        ((1.0, 1.0), "a reward that is always the same may not look at the completion"),
        ((0.0, 2.0), "there are higher ones"),
    ],
)
async def test_a_reward_that_may_be_a_constant_or_not_the_highest_is_a_stall(
    rewards: tuple[float, float] | None, why: str
) -> None:
    run = Ledger()
    run.steps, run.rewards = 38, rewards
    life = run.life()
    run.end_without_gradient(1.0)
    with pytest.raises(StallError, match=r"all rewards were equal \(10 of them were right: eval.success\); expected"):
        await life.decided()
    assert run.records == [], why


async def test_a_reward_below_another_one_of_these_tickets_is_a_stall() -> None:
    """They may be in no step yet, or never: what they are is known all the same."""
    run = Ledger()
    run.steps, run.rewards = 38, (0.0, 1.0)
    life = run.life()
    run.end_without_gradient(1.25, 1.0)
    with pytest.raises(StallError, match="10 of them were right"):
        await life.decided()
    assert run.records == []


@pytest.mark.parametrize(
    ("success", "steps", "ends"), [(1.0, 38, True), (0.5, 38, True), (1.5, 38, False), (1.0, 39, False)]
)
async def test_a_later_life_of_a_solved_run_trains_nothing(
    success: float, steps: int, ends: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Unless more is asked of its completions; and whatever its patience is."""
    run = Ledger()
    run.steps = steps
    before = EarlyStopRecord(38, metric="reward", best=1.0, best_steps=38, solved_tickets=80, success=1.0)
    assert await run.life(before, success=success, patience=0).decided() == ends
    assert (run.book.issue() == []) == ends
    assert ("begin a run with final/ as actor.path and harder prompts, to train on" in caplog.text) == ends


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

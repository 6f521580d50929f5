"""Whether two runs draw the same prompts, as their ledgers have it."""

from collections.abc import Sequence

import msgspec
import pytest

from penstock.contracts import DropReason
from penstock.contracts.ledger import (
    ArchivedRecord,
    DropRecord,
    Outcome,
    Record,
    RunRecord,
    StepRecord,
)
from penstock.records.draws import compared_draws, drawn

RUN = RunRecord("d", 6, 2, 4, 0, draws="a curriculum", set_sizes={"small": 2, "large": 4})
OUTCOMES = (Outcome(0, 1, 4), Outcome(3, 0, 4), Outcome(1, 2, 4), Outcome(4, 4, 4))


def ledger(outcomes: Sequence[Outcome], run: RunRecord = RUN) -> list[Record]:
    """Two steps of two tickets each; and one that was dropped, whose message was lost."""
    steps = [
        StepRecord(step, (2 * step, 2 * step + 1), "f", "d", outcomes=tuple(outcomes[2 * step : 2 * step + 2]))
        for step in (0, 1)
    ]
    return [run, *steps, DropRecord(9, DropReason.POISON)]


def compared(one: list[Record], other: list[Record]) -> str:
    first, second = drawn(one), drawn(other)
    assert first is not None
    assert second is not None
    return compared_draws(first, second)


def test_equal_draws_are_counted() -> None:
    assert compared(ledger(OUTCOMES), ledger(OUTCOMES)) == (
        "all 4 tickets that have ended in both draw the same prompt"
    )
    shorter = [*ledger(OUTCOMES)[:2], DropRecord(2, DropReason.DEGENERATE, outcome=OUTCOMES[2])]
    assert compared(ledger(OUTCOMES), shorter) == "all 3 tickets that have ended in both draw the same prompt"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {1: Outcome(3, 2, 4), 3: Outcome(2, 4, 4)},
            "3 of 4 tickets that have ended in both draw the same prompt (4 from the same set), and all before ticket "
            "3: outcomes, from which the curriculum draws, differ from ticket 1 on",
        ),
        (
            {3: Outcome(1, 4, 4)},
            "3 of 4 tickets that have ended in both draw the same prompt (3 from the same set), and all before ticket "
            "3: though no outcome before it differs",
        ),
    ],
)
def test_draws_that_part_are_explained(changed: dict[int, Outcome], expected: str) -> None:
    other = [changed.get(place, each) for place, each in enumerate(OUTCOMES)]
    assert compared(ledger(OUTCOMES), ledger(other)) == expected


def test_without_a_curriculum_the_first_record_decides() -> None:
    run = RunRecord("d", 6, 2, 4, 0)
    assert compared(ledger((), run), ledger((), run)).startswith("each ticket draws the same prompt in both")
    seeded = msgspec.structs.replace(run, seed=1, dataset_digest="e")
    assert compared(ledger((), run), ledger((), seeded)) == "not comparable: prompts, run.seed differ"


def test_a_long_ledger_begins_with_its_archive_or_the_record_that_stands_for_it() -> None:
    found = drawn([ArchivedRecord(RUN, 1, 10, (), 0, {}, ()), *ledger(OUTCOMES)[1:]])
    assert found is not None
    assert (found.run, len(found.outcomes)) == (RUN, 4)
    assert drawn([]) is None

"""Steps in a row that are not finite end the run; one, or some among others, do not."""

import logging
import math

import pytest

from penstock.errors import NonFiniteError
from penstock_trainer.batching.batch import make_batch
from penstock_trainer.grpo import Statistics, Sums
from penstock_trainer.learner.non_finite import NonFiniteSteps
from penstock_trainer.learner.update import StepResult
from tests.unit.trainer.batching.test_packing import rules

FINE, WITHOUT_GRADIENT, BROKEN = "fine", "without a gradient", "broken"


def result(kind: str) -> StepResult:
    loss, norm = {FINE: (0.1, 1.0), WITHOUT_GRADIENT: (0.0, 0.0), BROKEN: (0.1, math.nan)}[kind]
    counts = make_batch([], rules(), version=0).counts
    return StepResult(kind == FINE, loss, norm, 1e-6, Statistics.of(Sums()), counts, 1, 1, {}, {})


def note_all(limit: int, *kinds: str) -> None:
    steps = NonFiniteSteps(limit)
    for step, kind in enumerate(kinds):
        steps.note(step, result(kind))


def test_as_many_as_the_limit_in_a_row_end_the_run_by_name() -> None:
    with pytest.raises(
        NonFiniteError, match=r"step 4: loss 0\.1, gradient norm nan.*max_non_finite_steps 3.*lr"
    ) as caught:
        note_all(3, FINE, BROKEN, BROKEN, BROKEN)
    assert caught.value.exit_code == 8
    with pytest.raises(NonFiniteError):
        note_all(1, BROKEN)


def test_a_step_that_is_fine_begins_the_count_anew_and_one_without_a_gradient_does_not() -> None:
    note_all(3, BROKEN, BROKEN, FINE, BROKEN, BROKEN)
    with pytest.raises(NonFiniteError):
        note_all(3, BROKEN, BROKEN, WITHOUT_GRADIENT, BROKEN)


def test_a_new_life_goes_on_counting() -> None:
    steps = NonFiniteSteps(3)
    steps.begin(2)
    with pytest.raises(NonFiniteError):
        steps.note(7, result(BROKEN))


def test_each_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        note_all(5, BROKEN, FINE, BROKEN, BROKEN)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "step 1 is not finite",
        "step 3 is not finite",
        "step 4 is not finite",
    ]


@pytest.mark.parametrize(
    ("kinds", "ends_well"), [((BROKEN, FINE), True), ((FINE, BROKEN), True), ((BROKEN,) * 2, False)]
)
def test_a_run_must_not_end_in_a_row_of_them(kinds: tuple[str, ...], ends_well: bool) -> None:
    steps = NonFiniteSteps(5)
    for step, kind in enumerate(kinds):
        steps.note(step, result(kind))
    if ends_well:
        steps.finish()
        return
    with pytest.raises(
        NonFiniteError, match=r"the last 2 steps .*step 2: .*expected the run to end with a finite step"
    ):
        steps.finish()

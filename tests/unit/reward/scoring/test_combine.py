"""The weighted sum and its third state."""

import math
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import Score
from penstock_reward.processes.messages import Outcome
from penstock_reward.scoring.combine import Verdict
from penstock_reward.scoring.combine import combine as combine_within

finite = st.floats(-1e6, 1e6)
outcomes_by_name = st.dictionaries(st.text("abc", min_size=1), st.tuples(finite, finite), min_size=1)


def combine(weights: Mapping[str, float], outcomes: Mapping[str, Outcome]) -> Verdict:
    return combine_within(weights, outcomes, max_magnitude=1e300)


def value(number: float) -> Outcome:
    return Outcome(number, 0.0)


def test_the_sum_is_weighted() -> None:
    verdict = combine({"a": 1.0, "b": 0.5}, {"a": value(1.0), "b": value(-2.0)})
    assert verdict.score.value == 0.0
    assert verdict.score.failure == ""
    assert not verdict.kinds


def test_a_failed_component_fails_the_whole_and_is_named() -> None:
    failed = Outcome(None, 1.0, "timeout", "killed after 10 s")
    verdict = combine({"a": 1.0, "b": 0.5}, {"a": value(1.0), "b": failed})
    assert verdict.score.value is None
    assert verdict.score.failure == "b: killed after 10 s"
    assert verdict.kinds == {"timeout"}


def test_the_value_of_each_function_travels_unweighted_in_their_order() -> None:
    failed = Outcome(None, 1.0, "timeout", "slow")
    assert combine({"a": 1.0, "b": 0.5}, {"a": value(1.0), "b": value(-2.0)}).score.values == (1.0, -2.0)
    assert combine({"a": 1.0, "b": 0.5}, {"b": value(-2.0), "a": failed}).score.values == (None, -2.0)
    assert combine({"a": 2.0}, {"a": value(0.5)}).score.values == (0.5,)
    assert combine({"a": 1.0}, {"a": value(0.5)}).score.values == ()  # it is the score
    assert combine_within({"a": 1.0, "b": 1.0}, {"a": value(9.0), "b": value(9.0)}, 10).score.values == (9.0, 9.0)


def test_every_failed_component_is_named() -> None:
    failed = {"a": Outcome(None, 1.0, "timeout", "slow"), "b": Outcome(None, 0.0, "exception", "KeyError: 'x'")}
    verdict = combine({"a": 1.0, "b": 1.0}, failed)
    assert verdict.score.failure == "a: slow; b: KeyError: 'x'"
    assert verdict.kinds == {"timeout", "exception"}


@pytest.mark.parametrize("big", [1e308, -1e308])
@pytest.mark.parametrize("weight", [1.0, 10.0, -10.0])
def test_a_sum_that_is_not_finite_is_a_failure(big: float, weight: float) -> None:
    verdict = combine({"a": abs(weight), "b": weight}, {"a": value(big), "b": value(big)})
    assert verdict.score.value is None
    assert verdict.kinds == {"too_large"}
    assert combine({"a": 10.0}, {"a": value(big)}).score.value is None


@pytest.mark.parametrize("number", [1e155, -1e155, 1.000001e6])
def test_a_sum_beyond_the_bound_is_a_failure_that_names_the_key(number: float) -> None:
    verdict = combine_within({"mine:f": 2.0}, {"mine:f": value(number / 2)}, max_magnitude=1e6)
    assert verdict.score.value is None
    assert verdict.kinds == {"too_large"}
    assert "reward.max_magnitude" in verdict.score.failure
    assert f"mine:f {number / 2:g} * 2" in verdict.score.failure
    assert combine_within({"f": 1.0}, {"f": value(-1e6)}, max_magnitude=1e6).score.value == -1e6


@given(outcomes_by_name)
def test_the_sum_is_the_sum_in_any_order(given_values: dict[str, tuple[float, float]]) -> None:
    weights = {name: weight for name, (weight, _) in given_values.items()}
    outcomes = {name: value(number) for name, (_, number) in given_values.items()}
    expected = math.fsum(weight * number for weight, number in given_values.values())
    backwards = dict(reversed(list(weights.items())))
    assert combine(weights, outcomes).score.value == expected == combine(backwards, outcomes).score.value


@given(outcomes_by_name, st.data())
def test_one_failure_always_wins(given_values: dict[str, tuple[float, float]], data: st.DataObject) -> None:
    outcomes = {name: value(number) for name, (_, number) in given_values.items()}
    broken = data.draw(st.sampled_from(sorted(outcomes)))
    outcomes[broken] = Outcome(None, 0.0, "died", "gone")
    score = combine({name: weight for name, (weight, _) in given_values.items()}, outcomes).score
    assert score.value is None
    assert score.failure == f"{broken}: gone"


@pytest.mark.parametrize(
    ("form", "expected"),
    [(1.0, 0.5 * 1.0 + 2.0 * 3.0), (0.75, 0.5 * 0.75 + 2.0 * 3.0), (0.5, 0.5 * 0.5), (-1.0, 0.5 * -1.0)],
)
def test_a_function_with_a_gate_decides_whether_the_others_count(form: float, expected: float) -> None:
    weights, outcomes = {"form": 0.5, "math": 2.0}, {"form": value(form), "math": value(3.0)}
    verdict = combine_within(weights, outcomes, 1e6, {"form": 0.75, "not called for this row": 1.0})
    assert verdict.score == Score(expected, values=(form, 3.0))


def test_a_gate_that_is_shut_hides_no_failure() -> None:
    outcomes = {"form": value(0.0), "math": Outcome(None, 1.0, "timeout", "killed after 10 s")}
    assert combine_within({"form": 1.0, "math": 1.0}, outcomes, 1e6, {"form": 1.0}).score.value is None

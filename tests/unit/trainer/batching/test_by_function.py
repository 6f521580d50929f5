"""Advantages of each reward function, summed: GDPO (arXiv 2601.05242), against its formula in plain Python."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from penstock.contracts import Score, ScoredGroup
from penstock.errors import DataError
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.learner.recipe import advantage_test, gradient_test
from tests.unit.trainer.trainer_groups import completion, config_for, scored_group

FUNCTIONS = ("math", "format")
WEIGHTS = {"math": 2.0, "format": 1.0}
EPS = 1e-6
ROUNDING = 1e-6  # of sums of float32 whose parts are at most 4
RULES = BatchRules(Overlong(8), eps=EPS, by_function=WEIGHTS)


def group_of(number: int, values: Sequence[tuple[float, float] | None]) -> ScoredGroup:
    """A completion for each pair of values; None: it failed. The reward is the sum."""
    answers = [completion([7] * (1 + index), [-1.0] * (1 + index)) for index in range(len(values))]
    group = scored_group(number, [4], answers, [None if pair is None else sum(pair) for pair in values])
    scores = [
        score if pair is None else Score(score.value, values=pair)
        for score, pair in zip(group.scores, values, strict=True)
    ]
    return msgspec.structs.replace(group, scores=tuple(scores), functions=FUNCTIONS)


def advantages_of(groups: Sequence[ScoredGroup], rules: BatchRules = RULES) -> list[float]:
    return list(make_batch(groups, rules, version=0).advantages.values())


def expected(groups: Sequence[Sequence[tuple[float, float] | None]]) -> list[float]:
    found = []
    for values in groups:
        valid = [pair for pair in values if pair is not None]
        totals = [0.0] * len(valid)
        for name, column in zip(FUNCTIONS, zip(*valid, strict=True), strict=True):
            mean, deviation = statistics.fmean(column), statistics.stdev(column)
            totals = [
                total + WEIGHTS[name] * (value - mean) / (deviation + EPS)
                for total, value in zip(totals, column, strict=True)
            ]
        found += totals
    return found


VALUES: list[list[tuple[float, float] | None]] = [
    [(1.0, 0.0), (0.0, 10.0), (1.0, 10.0), None],
    [(0.0, 0.5), (0.0, 0.25)],
]


def test_each_function_has_its_own_mean_and_deviation() -> None:
    groups = [group_of(number, values) for number, values in enumerate(VALUES)]
    assert advantages_of(groups) == pytest.approx(expected(VALUES), rel=1e-5, abs=ROUNDING)
    scaled = [[None if pair is None else (pair[0], 100 * pair[1]) for pair in values] for values in VALUES]
    again = [group_of(number, values) for number, values in enumerate(scaled)]
    assert advantages_of(again) == pytest.approx(advantages_of(groups), rel=1e-4, abs=ROUNDING)


def test_the_sum_is_whitened_over_the_batch() -> None:
    groups = [group_of(number, values) for number, values in enumerate(VALUES)]
    sums = expected(VALUES)
    mean, deviation = statistics.fmean(sums), statistics.stdev(sums)
    found = advantages_of(groups, replace(RULES, whitening="completions"))
    assert found == pytest.approx([(value - mean) / (deviation + EPS) for value in sums], rel=1e-4, abs=1e-5)


def test_a_group_is_degenerate_if_no_function_tells_its_completions_apart() -> None:
    equal_sums, equal = group_of(0, [(1.0, 0.0), (0.0, 1.0)]), group_of(1, [(1.0, 0.5), (1.0, 0.5)])
    batch = make_batch([equal_sums, equal], RULES, version=0)
    assert batch.counts.num_degenerate_groups == 1
    assert [sample.index.group for sample in batch.samples] == [0, 0]
    config = config_for(
        Path("unused"),
        loss={"advantage": {"by_function": WEIGHTS}},
        reward={"functions": {"math": 1.0, "format": 1.0}},
    )
    for test in (gradient_test, advantage_test):
        assert [test(config)(group) for group in (equal_sums, equal)] == [True, False]


def test_a_function_that_was_not_called_for_a_group_adds_nothing_to_it() -> None:
    values: list[tuple[float, float] | None] = [(1.0, 0.0), (0.0, 0.0), (0.0, 3.0)]
    group = group_of(0, values)
    other = msgspec.structs.replace(group, functions=("math", "length"))
    found = advantages_of([group, other])
    only_math = advantages_of([other], BatchRules(Overlong(8), eps=EPS, by_function={"math": 2.0}))
    assert found[:3] == pytest.approx(expected([values]), rel=1e-5, abs=ROUNDING)
    assert found[3:] == pytest.approx(only_math, abs=ROUNDING)


def test_a_group_that_other_functions_scored_is_an_error_that_names_the_key() -> None:
    group = msgspec.structs.replace(group_of(7, [(1.0, 0.0), (0.0, 1.0)]), functions=("a", "b"))
    with pytest.raises(
        DataError, match=r"ticket 7 was scored by a, b: .*loss\.advantage\.by_function \(math, format\)"
    ):
        make_batch([group], RULES, version=0)

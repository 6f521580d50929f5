"""Advantages: closed forms, and how they change when rewards shift, scale, permute or fail."""

import math
import random
import statistics
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from penstock.config import LossSection
from penstock.config.loss import AdvantageSection
from penstock_trainer.grpo import Baseline, Scale, advantages, varies, whitened

EPS = 1e-6


def is_accepted(baseline: Baseline, scale: Scale) -> bool:
    try:
        LossSection(advantage=AdvantageSection(baseline=baseline, scale=scale))
    except ValidationError:
        return False
    return True


BASELINES, SCALES = get_args(Baseline), get_args(Scale)
COMBINATIONS = [(b, s) for b in BASELINES for s in SCALES if is_accepted(b, s)]
REWARDS = st.lists(
    st.lists(st.integers(-400, 400).map(lambda n: n / 8), min_size=3, max_size=3), min_size=1, max_size=4
)


Rows = Sequence[Sequence[float | None]]


def expected(rows: Rows, baseline: str, scale: str) -> list[list[float]]:
    """The formulas in plain Python."""
    flat = [value for row in rows for value in row if value is not None]
    valid = [[value for value in row if value is not None] for row in rows]

    def base(group: list[float], own: float) -> float:
        if baseline == "leave_one_out":
            return (sum(group) - own) / (len(group) - 1)
        return {"group": statistics.fmean(group), "batch": statistics.fmean(flat), "none": 0.0}[baseline]

    def spread(group: list[float]) -> float:
        size = statistics.fmean(map(abs, group))
        return {
            "group": statistics.stdev(group) + EPS,
            "batch": statistics.stdev(flat) + EPS,
            "mean": size or math.inf,
            "none": 1.0,
        }[scale]

    return [
        [0.0 if own is None else (own - base(group, own)) / spread(group) for own in row]
        for row, group in zip(rows, valid, strict=True)
    ]


def computed(rows: Rows, baseline: Baseline, scale: Scale) -> list[list[float]]:
    rewards = torch.tensor([[math.nan if value is None else value for value in row] for row in rows]).double()
    valid = torch.tensor([[value is not None for value in row] for row in rows])
    found: list[list[float]] = advantages(rewards, valid, baseline=baseline, scale=scale, eps=EPS).tolist()
    return found


@pytest.mark.parametrize(("baseline", "scale"), COMBINATIONS)
def test_they_equal_the_formula_and_failed_rewards_are_not_there(baseline: Baseline, scale: Scale) -> None:
    rows: list[list[float | None]] = [
        [1.0, 0.0, 1.0, None],
        [None, 0.25, -3.0, 1.0],
        [0.5, 0.5, 0.5, 0.5],
        [2.0, 7.0, None, None],
    ]
    for found, wanted in zip(computed(rows, baseline, scale), expected(rows, baseline, scale), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-7)


@given(REWARDS, st.integers(-80, 80))
@pytest.mark.parametrize(("baseline", "scale"), [c for c in COMBINATIONS if c[0] != "none" and c[1] != "mean"])
def test_a_shift_of_all_rewards_changes_nothing(
    baseline: Baseline, scale: Scale, rewards: list[list[float]], shift: int
) -> None:
    moved = [[value + shift for value in row] for row in rewards]
    for before, after in zip(computed(rewards, baseline, scale), computed(moved, baseline, scale), strict=True):
        assert after == pytest.approx(before, rel=1e-4, abs=1e-4)


@given(REWARDS, st.sampled_from([0.5, 2.0, 64.0]))
@pytest.mark.parametrize(("baseline", "scale"), COMBINATIONS)
def test_a_scale_of_all_rewards_is_kept_or_cancelled(
    baseline: Baseline, scale: Scale, rewards: list[list[float]], factor: float
) -> None:
    larger = [[value * factor for value in row] for row in rewards]
    before, after = computed(rewards, baseline, scale), computed(larger, baseline, scale)
    expected_factor = factor if scale == "none" else 1.0
    for row, scaled in zip(before, after, strict=True):
        assert scaled == pytest.approx([expected_factor * value for value in row], rel=1e-4, abs=1e-4)


@given(REWARDS, st.randoms(use_true_random=False))
@pytest.mark.parametrize(("baseline", "scale"), COMBINATIONS)
def test_groups_and_completions_may_be_permuted(
    baseline: Baseline, scale: Scale, rewards: list[list[float]], source: random.Random
) -> None:
    rows = source.sample(range(len(rewards)), len(rewards))
    columns = source.sample(range(3), 3)
    before = computed(rewards, baseline, scale)
    after = computed([[rewards[i][j] for j in columns] for i in rows], baseline, scale)
    for line, i in zip(after, rows, strict=True):
        assert line == pytest.approx([before[i][j] for j in columns], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e30, 1e-300])
@pytest.mark.parametrize(("baseline", "scale"), [c for c in COMBINATIONS if c[0] != "none"])
def test_equal_rewards_give_exactly_zero(baseline: Baseline, scale: Scale, value: float) -> None:
    assert computed([[value] * 7], baseline, scale) == [[0.0] * 7]


FINITE = st.floats(-1e6, 1e6) | st.sampled_from([0.0, 1.0, 1.0, -1.0])


@given(st.lists(st.lists(FINITE, min_size=4, max_size=4), min_size=1, max_size=3))
@pytest.mark.parametrize(("baseline", "scale"), [c for c in COMBINATIONS if c[1] != "none"])
def test_no_accepted_advantage_is_larger_than_its_rewards_are_many(
    baseline: Baseline, scale: Scale, rewards: list[list[float]]
) -> None:
    """Whatever the rewards are. The bound of a deviation and of a mean: (n - 1) / sqrt(n) and n - 1."""
    largest = max(abs(value) for row in computed(rewards, baseline, scale) for value in row)
    assert largest <= len(rewards) * len(rewards[0])


@pytest.mark.parametrize(("baseline", "scale"), [("batch", "group"), ("none", "group"), ("none", "batch")])
def test_the_pairs_that_divide_by_eps_alone_are_refused(baseline: Baseline, scale: Scale) -> None:
    rows = [[1.0, 1.0, 1.0]] if scale == "batch" else [[1.0, 1.0, 1.0], [4.0, 0.0, 0.0]]
    assert abs(computed(rows, baseline, scale)[0][0]) > 1e5
    assert not is_accepted(baseline, scale)


@pytest.mark.parametrize(("baseline", "scale"), [c for c in COMBINATIONS if c[0] in ("group", "leave_one_out")])
def test_rewards_within_the_tolerance_are_equal_and_change_no_other_group(baseline: Baseline, scale: Scale) -> None:
    rewards = torch.tensor([[1.0, 1.25, 1.125], [1.0, 1.5, 1.0]]).double()
    valid = torch.ones(2, 3, dtype=torch.bool)
    plain, tolerant = (
        advantages(rewards, valid, baseline=baseline, scale=scale, eps=EPS, tolerance=tolerance)
        for tolerance in (0.0, 0.25)
    )
    assert plain[0].abs().max() > 0.1
    assert tolerant[0].tolist() == [0.0] * 3
    assert tolerant[1].tolist() == plain[1].tolist()
    for tolerance, expected in ((0.0, True), (0.25, False)):
        assert varies([1.0, None, 1.25], tolerance) == expected


COUNTED = st.lists(st.tuples(st.integers(-40, 40).map(lambda n: n / 8), st.integers(0, 5)), min_size=2, max_size=8)


@given(COUNTED)
def test_whitening_is_that_of_a_list_with_an_entry_for_each_token(pairs: list[tuple[float, int]]) -> None:
    """verl's masked_whiten, without its padding."""
    entries = [value for value, count in pairs for _ in range(count)]
    values, counts = (torch.tensor([column]).double() for column in zip(*pairs, strict=True))
    found = whitened(values, counts, eps=EPS)[0].tolist()
    if len(set(entries)) < 2:
        assert found == [0.0] * len(pairs)
        return
    mean, deviation = statistics.fmean(entries), statistics.stdev(entries)
    expected = [(value - mean) / (deviation + EPS) if count else 0.0 for value, count in pairs]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert max(map(abs, found)) <= len(entries) ** 0.5


@given(st.lists(st.lists(st.integers(0, 8).map(float), min_size=4, max_size=4), min_size=1, max_size=3))
def test_the_mean_scale_is_that_of_the_paper_where_the_paper_defines_it(rewards: list[list[float]]) -> None:
    for row, found in zip(rewards, computed(rewards, "group", "mean"), strict=True):
        mean = statistics.fmean(row)
        assert found == pytest.approx([(value - mean) / mean if mean else 0.0 for value in row], rel=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_configuration_knows_which_baselines_train_equal_rewards(baseline: Baseline) -> None:
    among_others = computed([[1.0, 1.0, 1.0], [3.0, 0.0, 0.0]], baseline, "none")
    higher = computed([[1.0, 1.0, 1.0], [3.0, 3.0, 0.0]], baseline, "none")
    section = AdvantageSection(baseline=baseline, scale="none")
    assert section.trains_equal_rewards == any(among_others[0] + higher[0])

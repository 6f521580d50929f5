"""Figures of prompts that were sampled several times, against their definitions."""

from fractions import Fraction
from itertools import combinations
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_trainer.rollouts.repeated import interval, mean, pass_at, pass_figures


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_choices_of_k_that_have_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    chosen = list(combinations(right, k))
    expected = Fraction(sum(any(each) for each in chosen), len(chosen))
    assert pass_at(len(right), sum(right), k) == pytest.approx(float(expected))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_the_ends_of_an_interval_are_the_means_that_the_prompts_just_do_not_reject(shares: list[float]) -> None:
    found, seen = interval(shares), mean(shares)
    assert seen is not None
    assert 0 <= found["low"] <= seen + 1e-9
    assert seen - 1e-9 <= found["high"] <= 1
    z = NormalDist().inv_cdf(0.975)
    for end in found.values():
        if 0 < end < 1:
            assert abs(seen - end) == pytest.approx(z * (end * (1 - end) / len(shares)) ** 0.5, rel=1e-4, abs=1e-6)


def test_a_prompt_is_in_each_pass_at_k_for_which_it_has_enough_rewards() -> None:
    figures = pass_figures([(6, 6), (6, 0), (3, 1), (0, 0)], 6)
    assert {k: each["value"] for k, each in figures.items()} == pytest.approx(
        {"1": (1 + 0 + 1 / 3) / 3, "2": (1 + 0 + 2 / 3) / 3, "4": 0.5, "6": 0.5}
    )
    assert figures["4"]["low"] < 0.5 < figures["4"]["high"]
    assert pass_figures([(0, 0)], 1) == {}
    assert (interval([]), mean([])) == ({}, None)

"""Which completions of a step are shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import rewards_of
from penstock_trainer.batching.shown import choose_shown
from tests.unit.trainer.trainer_groups import completion, scored_group


def group(*rewards: float | None) -> ScoredGroup:
    return scored_group(0, [3], [completion([4], [-1.0])] * len(rewards), rewards)


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, []),
        (1, [(2, 1)]),  # the failed one
        (4, [(2, 1), (1, 0), (1, 1), (1, 2)]),  # then the group with the widest rewards, whole
        (6, [(2, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 2)]),
        (9, [(2, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (0, 0), (0, 1), (0, 2)]),
        (99, [(2, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 2), (0, 0), (0, 1), (0, 2)]),
    ],
)
def test_one_that_failed_comes_first_then_whole_groups_by_how_far_their_rewards_differ(
    most: int, expected: list[tuple[int, int]]
) -> None:
    assert choose_shown([group(1.0, 1.0, 1.0), group(0.0, 1.0, 0.0), group(0.5, None, 0.75)], most) == expected


def test_of_a_large_group_the_worst_the_best_and_some_in_between_are_shown() -> None:
    large = group(*(index / 10 for index in (3, 9, 0, 5, 7, 1, 8, 2, 6, 4)))
    assert [rewards_of(large)[index] for _, index in choose_shown([large], 4)] == [0.3, 0.9, 0.0, 0.6]
    assert [rewards_of(large)[index] for _, index in choose_shown([large], 1)] == [0.9]


@given(st.lists(st.lists(st.none() | st.floats(-2, 2), min_size=1, max_size=6), max_size=4), st.integers(0, 20))
def test_each_is_shown_once_and_as_many_as_there_may_be(rewards: list[list[float | None]], most: int) -> None:
    groups = [group(*each) for each in rewards]
    chosen = choose_shown(groups, most)
    assert len(set(chosen)) == len(chosen)
    failed = [rewards[b][g] is None for b, g in chosen]
    num_valid = sum(value is not None for each in rewards for value in each)
    any_failed = any(value is None for each in rewards for value in each)
    assert sum(failed) == int(any_failed and most > 0)
    assert len(chosen) == min(most, num_valid + int(any_failed))

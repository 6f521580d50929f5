"""reward.scale and reward.clip: what advantages are made of, and what figures show of it."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import ScoredGroup
from penstock.contracts.outcomes import rewards_of
from penstock_trainer.batching.batch import BatchRules, Overlong, Truncated, make_batch, shaped_rewards
from penstock_trainer.batching.reward_columns import RewardScale
from tests.unit.trainer.batching.test_truncated import made
from tests.unit.trainer.trainer_groups import scored_group

PLAIN = BatchRules(Overlong(8), scale="none")


def group_of(rewards: Sequence[float | None], number: int = 0) -> ScoredGroup:
    return scored_group(number, [4], made([2] * len(rewards), [True] * len(rewards)), rewards)


def rules_of(scale: float, clip: tuple[float, float] | None) -> BatchRules:
    return BatchRules(Overlong(8), scale="none", reward_scale=RewardScale(scale, clip))


@given(
    rewards=st.lists(st.floats(-9, 9, width=16), min_size=2, max_size=5),
    scale=st.sampled_from([0.25, 1.0, 3.0]),
    clip=st.sampled_from([None, (-1.0, 2.0), (0.5, 1.5)]),
)
def test_advantages_are_those_of_numpys_clip(
    rewards: list[float], scale: float, clip: tuple[float, float] | None
) -> None:
    shaped = np.asarray(rewards) * scale
    shaped = shaped if clip is None else np.clip(shaped, *clip)
    batch = make_batch([group_of(list(rewards))], rules_of(scale, clip), version=0)
    expected = np.zeros_like(shaped) if np.ptp(shaped) == 0 else shaped - shaped.mean()
    assert list(batch.advantages.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_rewards_and_evaluations_stay_as_scored_and_figures_show_both() -> None:
    groups = [group_of([3.0, -4.0, None, 1.0]), group_of([None, 0.5], 1)]
    before = [rewards_of(group) for group in groups]
    counts = make_batch(groups, rules_of(0.5, (-1.0, 1.0)), version=0).counts
    assert [rewards_of(group) for group in groups] == before
    assert (counts.reward_mean, counts.reward_min, counts.reward_max) == (0.125, -4.0, 3.0)
    shaped = [1.0, -1.0, 0.5, 0.25]
    assert counts.shaped_reward_mean == pytest.approx(np.mean(shaped))
    assert counts.shaped_reward_std == pytest.approx(np.std(shaped))
    assert counts.clipped_reward_ratio == 0.5


def test_without_scale_and_bounds_both_figures_are_the_same() -> None:
    counts = make_batch([group_of([3.0, -4.0, 0.1])], PLAIN, version=0).counts
    assert (counts.shaped_reward_mean, counts.shaped_reward_std) == (counts.reward_mean, counts.reward_std)
    assert counts.clipped_reward_ratio == 0.0


def test_a_batch_without_a_reward_has_none_of_these_figures() -> None:
    counts = make_batch([group_of([None, None])], rules_of(2.0, (0.0, 1.0)), version=0).counts
    assert all(map(math.isnan, (counts.shaped_reward_mean, counts.shaped_reward_std, counts.clipped_reward_ratio)))


@pytest.mark.parametrize(
    ("clip", "num_degenerate"), [(None, 0), ((0.0, 1.0), 1), ((0.0, 5.0), 0)], ids=["none", "equal", "wide"]
)
def test_a_group_that_differs_only_beyond_a_bound_is_degenerate(
    clip: tuple[float, float] | None, num_degenerate: int
) -> None:
    batch = make_batch([group_of([2.0, 3.0])], rules_of(1.0, clip), version=0)
    assert batch.counts.num_degenerate_groups == num_degenerate
    assert len(batch.samples) == (0 if num_degenerate else 2)


def test_penalties_of_length_come_after_the_bounds() -> None:
    group = scored_group(0, [4], made([2, 8], [True, False]), [4.0, 4.0])
    scale = RewardScale(0.5, (0.0, 1.0))
    cut = BatchRules(Overlong(8), truncated=Truncated("penalty", 3.0), reward_scale=scale)
    assert shaped_rewards(group, cut) == [1.0, -2.0]
    overlong = BatchRules(Overlong(8, buffer_tokens=4, penalty=2.0), reward_scale=scale)
    assert shaped_rewards(group, overlong) == [1.0, -1.0]

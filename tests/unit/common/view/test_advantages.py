"""A reader's advantages are those that the trainer computes."""

from typing import Literal, get_args

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import Completion, FinishReason, ScoredGroup
from penstock.contracts.outcomes import rewards_of
from penstock.view.advantages import advantages, advantages_of, shaped_rewards
from penstock_trainer.batching.batch import BatchRules, Overlong, Truncated, make_batch
from penstock_trainer.batching.batch import shaped_rewards as shaped_by_trainer
from penstock_trainer.batching.reward_columns import RewardScale
from penstock_trainer.grpo import advantages as trained
from penstock_trainer.grpo.advantages import Baseline, Scale, Whitening
from tests.unit.common.view.conftest import Made

REWARDS = st.lists(st.one_of(st.none(), st.floats(-2, 2, width=16)), min_size=3, max_size=3).filter(
    lambda rewards: sum(reward is not None for reward in rewards) >= 2
)


@pytest.mark.parametrize("baseline", get_args(Baseline))
@pytest.mark.parametrize("scale", get_args(Scale))
@given(groups=st.lists(REWARDS, min_size=1, max_size=4), tolerance=st.sampled_from([0.0, 0.5]))
def test_they_equal_the_trainers_for_each_baseline_and_scale(
    groups: list[list[float | None]], baseline: Baseline, scale: Scale, tolerance: float
) -> None:
    eps = 0.5  # large: a pair whose scale bounds no distance divides by it alone
    rewards_BG = torch.tensor([[reward or 0.0 for reward in group] for group in groups], dtype=torch.float64)
    valid_BG = torch.tensor([[reward is not None for reward in group] for group in groups])
    rules = {"eps": eps, "tolerance": tolerance}
    expected = trained(rewards_BG, valid_BG, baseline=baseline, scale=scale, **rules).tolist()
    found = advantages(groups, baseline=baseline, scale=scale, **rules)
    for row, seen, wanted in zip(groups, found, expected, strict=True):
        assert [value is None for value in seen] == [reward is None for reward in row]
        given_values = [value for reward, value in zip(row, wanted, strict=True) if reward is not None]
        assert [value for value in seen if value is not None] == pytest.approx(given_values, rel=1e-4, abs=1e-5)


def test_a_steps_advantages_equal_those_of_its_batch_with_the_overlong_penalty(made: Made) -> None:
    groups = made.view._groups(made.view._record(1), 1)
    lengths = [each.num_tokens for each in groups[0].group.trajectories if isinstance(each, Completion)]
    assert len(set(lengths)) > 1
    settings = {
        **made.run.settings,
        "sampling.max_new_tokens": 5,
        "loss.overlong.buffer_tokens": 3,
        "loss.overlong.penalty": 0.5,
    }
    batch = make_batch(groups, BatchRules(Overlong(5, 3, 0.5)), version=0)
    found = advantages_of(groups, settings)
    assert found is not None
    for index, value in batch.advantages.items():
        assert found[index.group][index.completion] == pytest.approx(value, rel=1e-5)
    num_found = sum(value is not None for row in found for value in row)
    assert num_found == len(batch.advantages) == 7


@pytest.mark.parametrize("treatment", ["leave_out", "zero", "penalty"])
def test_they_are_those_of_its_batch_for_each_treatment_of_truncated_completions(
    made: Made, treatment: Literal["leave_out", "zero", "penalty"]
) -> None:
    whole = made.view._groups(made.view._record(1), 1)
    groups = [_cut_every_other(group) for group in whole]
    settings = {**made.run.settings, "loss.truncated": treatment, "loss.truncated_penalty": 0.5}
    batch = make_batch(groups, BatchRules(Overlong(64), truncated=Truncated(treatment, 0.5)), version=0)
    found = advantages_of(groups, settings)
    assert found is not None
    for index, value in batch.advantages.items():
        assert found[index.group][index.completion] == pytest.approx(value, rel=1e-5)
    plain = make_batch(whole, BatchRules(Overlong(64)), version=0)
    assert (batch.advantages == plain.advantages) == (treatment == "leave_out")


@pytest.mark.parametrize("treatment", ["train", "penalty"])
@pytest.mark.parametrize("clip", [None, (0.25, 0.75)])
def test_they_are_those_of_its_batch_with_scaled_and_clipped_rewards(
    made: Made, clip: tuple[float, float] | None, treatment: Literal["train", "penalty"]
) -> None:
    groups = [_cut_every_other(group) for group in made.view._groups(made.view._record(1), 1)]
    changed = {"reward.scale": 0.5, "reward.clip": clip, "loss.truncated": treatment, "loss.truncated_penalty": 0.5}
    settings = {**made.run.settings, **changed}
    rules = BatchRules(Overlong(64), truncated=Truncated(treatment, 0.5), reward_scale=RewardScale(0.5, clip))
    batch = make_batch(groups, rules, version=0)
    found = advantages_of(groups, settings)
    assert found is not None
    for index, value in batch.advantages.items():
        assert found[index.group][index.completion] == pytest.approx(value, rel=1e-5)
    for group in groups:
        assert shaped_rewards(group, settings) == shaped_by_trainer(group, rules)
    assert any(shaped_rewards(group, settings) != rewards_of(group) for group in groups)


def _cut_every_other(scored: ScoredGroup) -> ScoredGroup:
    replace = msgspec.structs.replace
    ends: tuple[FinishReason, ...] = ("length", "stop")
    found = tuple(replace(each, finish_reason=ends[g % 2]) for g, each in enumerate(scored.group.completions))
    return replace(scored, group=replace(scored.group, completions=found))


@pytest.mark.parametrize("treatment", ["train", "leave_out"])
@pytest.mark.parametrize("whitening", ["completions", "tokens"])
def test_a_steps_whitened_advantages_equal_those_of_its_batch(
    made: Made, whitening: Whitening, treatment: Literal["train", "leave_out"]
) -> None:
    groups = [_cut_every_other(group) for group in made.view._groups(made.view._record(1), 1)]
    changed = {"loss.advantage.whitening": whitening, "loss.truncated": treatment}
    found = advantages_of(groups, {**made.run.settings, **changed})
    batch = make_batch(groups, BatchRules(Overlong(5), truncated=Truncated(treatment), whitening=whitening), version=0)
    assert found is not None
    for index, value in batch.advantages.items():
        assert found[index.group][index.completion] == pytest.approx(value, rel=1e-5)
    assert len(set(batch.advantages.values())) > 2


@pytest.mark.parametrize(
    "change",
    [
        {"kl_ctl": 0.1, "loss.kl.place": "reward"},
        {"loss.advantage.eps": None},
        {"loss.advantage.function": "my_objective:advantages"},
        {"loss.advantage.by_function": {"math": 1.0}},
    ],
)
def test_there_are_none_if_the_files_do_not_tell(made: Made, change: dict[str, object]) -> None:
    settings = {name: value for name, value in {**made.run.settings, **change}.items() if value is not None}
    assert advantages_of(made.view._groups(made.view._record(1), 1), settings) is None

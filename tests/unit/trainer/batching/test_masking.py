"""Tokens that are too stale for their step: which are masked, their effect on the loss, and the counts."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import Completion, PolicyIdentity, ScoredGroup, VersionSpan, pack_float32, unpack_float32
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.batching.counts import CompletionIndex
from penstock_trainer.batching.masking import (
    is_all_masked,
    num_trained_tokens,
    oldest_trained_version,
    token_lags,
    trained_mask,
)
from penstock_trainer.learner.learner import Learner
from tests.unit.trainer.trainer_groups import completion, config_for, example_groups, save_tiny_model, scored_group

VERSION, MAX_LAG = 5, 1
RULES = BatchRules(Overlong(64))


def aged(plain: Completion, versions: Sequence[int]) -> Completion:
    """The completion, with this version for each token."""
    starts = [0, *(t for t in range(1, len(versions)) if versions[t] != versions[t - 1]), len(versions)]
    spans = tuple(
        VersionSpan(PolicyIdentity(versions[start], "0" * 16), start, end)
        for start, end in pairwise(starts)
        if start < end
    )
    return msgspec.structs.replace(plain, spans=spans)


def answer(versions: Sequence[int], mask: Sequence[int] | None = None) -> Completion:
    tokens = list(range(7, 7 + len(versions)))
    return aged(completion(tokens, [-3.0] * len(versions), mask), versions)


def with_completions(group: ScoredGroup, completions: Sequence[Completion]) -> ScoredGroup:
    return msgspec.structs.replace(group, group=msgspec.structs.replace(group.group, completions=tuple(completions)))


@given(
    ages=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    version=st.integers(9, 12),
    max_lag=st.one_of(st.none(), st.integers(0, 9)),
    data=st.data(),
)
def test_what_is_left_is_young_and_all_that_is_young_is_left(
    ages: list[int], version: int, max_lag: int | None, data: st.DataObject
) -> None:
    masks = st.lists(st.integers(0, 2), min_size=len(ages), max_size=len(ages))
    loss_mask = data.draw(st.none() | masks)
    found = answer(ages, loss_mask)
    left = trained_mask(found, version, max_lag).tolist()
    assert token_lags(found, version).tolist() == [version - each for each in ages]
    young = [max_lag is None or version - each <= max_lag for each in ages]
    assert left == [bool(m) and y for m, y in zip(loss_mask or [1] * len(ages), young, strict=True)]
    assert num_trained_tokens(found, version, max_lag) == sum(left)
    kept = [each for each, is_young in zip(ages, young, strict=True) if is_young]
    assert oldest_trained_version(found, version, max_lag) == min(kept, default=None)


def test_only_completions_with_a_reward_keep_a_group_from_being_all_masked() -> None:
    group = scored_group(0, [4], [answer([1, 3]), answer([2]), answer([5])], [1.0, 0.0, None])
    assert is_all_masked(group, VERSION, MAX_LAG)
    assert not is_all_masked(group, VERSION, 2)


def test_masking_takes_tokens_away_and_leaves_every_weight_as_it_was() -> None:
    answers = [answer([3, 4, 5]), answer([1, 2]), answer([5, 5])]
    groups = [scored_group(0, [4], answers, [1.0, 0.0, 0.4]), scored_group(1, [5], answers[1:], [1.0, 0.0])]
    for aggregation in ("seq-mean-token-sum", "seq-mean-token-mean", "token-mean", "token-sum-norm"):
        rules = BatchRules(Overlong(64), aggregation=aggregation, norm_length=64)
        whole = {each.index: each for each in make_batch(groups, rules, version=VERSION).samples}
        masked = {each.index: each for each in make_batch(groups, rules, version=VERSION, max_lag=MAX_LAG).samples}
        assert list(masked) == [(0, 0), (0, 2), (1, 1)]
        for index, sample in masked.items():
            assert (sample.weight, sample.advantage) == (whole[index].weight, whole[index].advantage)
        assert masked[CompletionIndex(0, 0)].loss_mask.tolist() == [False, True, True]


def test_the_counts_say_what_was_too_old() -> None:
    old, young = answer([1, 2, 3]), answer([4, 5])
    groups = [
        scored_group(0, [4], [old, young], [1.0, 0.0]),
        scored_group(1, [5], [old, answer([3])], [1.0, 0.0]),  # all of its tokens are masked
        scored_group(2, [6], [old, old], [1.0, 1.0]),  # had no gradient anyway
    ]
    counts = make_batch(groups, RULES, version=VERSION, max_lag=MAX_LAG).counts
    assert counts.num_loss_tokens == 3 + 2 + 3 + 1 + 3 + 3
    assert counts.masked_stale == pytest.approx(13 / 15)
    assert (counts.num_stale_completions, counts.num_stale_groups, counts.num_degenerate_groups) == (5, 1, 1)
    assert (counts.num_groups, counts.length_trained) == (3, 2.0)
    without = make_batch(groups, RULES, version=VERSION).counts
    assert (without.masked_stale, without.num_stale_completions, without.num_stale_groups) == (0.0, 0, 0)


def test_the_counts_say_what_gave_no_signal() -> None:
    whole, cut = answer([1, 2]), msgspec.structs.replace(answer([3, 4]), finish_reason="length")
    groups = [
        scored_group(0, [4], [whole, cut, whole], [1.0, 0.0, None]),
        scored_group(1, [5], [whole, cut, whole], [1.0, 1.0, 1.0]),  # all are equal
        scored_group(2, [6], [whole, whole, cut], [1.0, None, None]),  # nothing to compare with
        scored_group(3, [7], [whole, whole, whole], [1.0, 0.0, 1.0]),
    ]
    counts = make_batch(groups, RULES, version=VERSION).counts
    assert (counts.failed_reward_ratio, counts.truncated_ratio, counts.no_signal_ratio) == (0.25, 0.25, 0.5)


def test_counts_of_a_batch_without_tokens() -> None:
    empty = completion([], [])
    counts = make_batch([scored_group(0, [4], [empty, empty], [1.0, 0.0])], RULES, version=0, max_lag=0).counts
    assert (counts.masked_stale, counts.num_stale_completions, counts.num_stale_groups) == (0.0, 0, 0)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "seq-mean-token-mean", "token-mean"])
def test_a_masked_token_is_as_one_whose_behaviour_is_unknown(model_folder: Path, aggregation: str) -> None:
    """Tokens of unknown behaviour are masked in the loss and stay in the denominators: the gradients must agree."""
    groups, unknown = [], []
    for group in example_groups():
        ages = [[3 + (t + g) % 3 for t in range(each.num_tokens)] for g, each in enumerate(group.group.completions)]
        old = [aged(each, sorted(age)) for each, age in zip(group.group.completions, ages, strict=True)]
        groups.append(with_completions(group, old))
        unknown.append(with_completions(group, [_forget(each) for each in old]))
    config = config_for(model_folder, loss={"aggregation": aggregation})
    masked = Learner(config).update(groups, version=VERSION, max_lag=MAX_LAG)
    expected = Learner(config).update(unknown, version=VERSION)
    whole = Learner(config).update(groups, version=VERSION)
    assert 0 < masked.counts.masked_stale < 1
    assert masked.statistics.num_tokens == expected.statistics.num_tokens < whole.statistics.num_tokens
    assert masked.loss == pytest.approx(expected.loss, abs=1e-6)
    assert masked.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    assert masked.grad_norm != pytest.approx(whole.grad_norm, rel=1e-3)


def _forget(old: Completion) -> Completion:
    values = unpack_float32(old.logprobs)
    lags = token_lags(old, VERSION).tolist()
    known = [math.nan if lag > MAX_LAG else value for value, lag in zip(values, lags, strict=True)]
    return msgspec.structs.replace(old, logprobs=pack_float32(known))


@pytest.mark.parametrize("loss", [{}, {"surrogate": "gspo"}, {"entropy_bonus": 0.1}, {"num_minibatches": 2}])
def test_a_batch_that_is_all_masked_changes_nothing(model_folder: Path, loss: dict[str, object]) -> None:
    learner = Learner(config_for(model_folder, loss=loss))
    before = {name: weight.clone() for name, weight in learner.weights().items()}
    result = learner.update(example_groups(), version=VERSION, max_lag=MAX_LAG)  # all are of version 0
    assert (result.changed, result.is_finite, result.num_packs) == (False, True, 0)
    assert (result.counts.masked_stale, result.counts.num_stale_groups) == (1.0, 4)
    assert all(torch.equal(weight, before[name]) for name, weight in learner.weights().items())


def test_a_short_batch_has_its_own_denominators() -> None:
    groups = example_groups(num_groups=3)
    for size in (1, 3):
        samples = make_batch(groups[:size], RULES, version=0).samples
        assert {sample.weight for sample in samples} == {1 / (size * 4)}

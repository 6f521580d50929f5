"""Truncated completions: left out of the loss, or with another reward."""

from collections.abc import Sequence

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import Completion, ScoredGroup
from penstock_trainer.batching.batch import Batch, BatchRules, Overlong, Truncated, make_batch, shaped_rewards
from penstock_trainer.batching.counts import CompletionIndex
from penstock_trainer.batching.masking import is_all_masked
from penstock_trainer.grpo import Aggregation
from tests.unit.trainer.batching.test_masking import answer
from tests.unit.trainer.episode_groups import context, episode, episode_group, sampled
from tests.unit.trainer.trainer_groups import completion, scored_group

NORM_LENGTH = 8
AGGREGATIONS: tuple[Aggregation, ...] = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm")
LEAVE_OUT = Truncated("leave_out")


def cut(plain: Completion) -> Completion:
    return msgspec.structs.replace(plain, finish_reason="length")


def made(lengths: Sequence[int], ends: Sequence[bool]) -> list[Completion]:
    plain = [completion([7 + t for t in range(length)], [-1.0] * length) for length in lengths]
    return [each if ended else cut(each) for each, ended in zip(plain, ends, strict=True)]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[ScoredGroup], torch.Tensor]:
    """Groups of the same size, and a loss for each token, [B * G, NORM_LENGTH]."""
    size, count = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    groups = []
    for number in range(count):
        lengths = draw(st.lists(st.integers(1, NORM_LENGTH), min_size=size, max_size=size))
        ends = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        rewards: list[float | None] = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=size, max_size=size))
        groups.append(scored_group(number, [4], made(lengths, ends), rewards))
    losses = draw(st.lists(st.floats(-2, 2), min_size=size * count * NORM_LENGTH, max_size=size * count * NORM_LENGTH))
    return groups, torch.tensor(losses, dtype=torch.float64).view(size * count, NORM_LENGTH)


def as_trl(groups: list[ScoredGroup], losses_NT: torch.Tensor, aggregation: Aggregation) -> float:
    """The loss in padded tensors, as TRL has it with mask_truncated_completions: the completion mask is zeroed."""
    each = [found for group in groups for found in group.group.completions]
    rewards_BG = torch.tensor([[score.value for score in group.scores] for group in groups], dtype=torch.float64)
    centred_BG = rewards_BG - rewards_BG.mean(1, keepdim=True)
    advantages_N1 = (centred_BG / (rewards_BG.std(1, keepdim=True) + 1e-6)).view(-1, 1)
    lengths_N1 = torch.tensor([found.num_tokens for found in each])[:, None]
    truncated_N1 = torch.tensor([found.finish_reason == "length" for found in each])[:, None]
    mask_NT = ((torch.arange(NORM_LENGTH)[None] < lengths_N1) & ~truncated_N1).double()
    values_NT = losses_NT * advantages_N1 * mask_NT
    if aggregation == "token-mean":  # loss_type dapo and bnpo
        return float(values_NT.sum() / mask_NT.sum().clamp(min=1))
    if aggregation == "seq-mean-token-mean":  # loss_type grpo
        return float((values_NT.sum(1) / mask_NT.sum(1).clamp(min=1)).mean())
    norm = NORM_LENGTH if aggregation == "token-sum-norm" else 1  # loss_type dr_grpo
    return float(values_NT.sum() / (len(each) * norm))


def loss_of(batch: Batch, losses_NT: torch.Tensor, group_size: int) -> float:
    total = 0.0
    for sample in batch.samples:
        row = sample.index.group * group_size + sample.index.completion
        total += sample.weight * sample.advantage * float(losses_NT[row, : sample.num_loss_tokens].sum())
    return total


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(made=batches())
def test_what_is_left_out_has_no_loss_and_keeps_its_reward_in_the_baseline(
    aggregation: Aggregation, made: tuple[list[ScoredGroup], torch.Tensor]
) -> None:
    groups, losses_NT = made
    overlong = Overlong(NORM_LENGTH)
    rules = BatchRules(overlong, truncated=LEAVE_OUT, aggregation=aggregation, norm_length=NORM_LENGTH)
    batch = make_batch(groups, rules, version=0)
    found = loss_of(batch, losses_NT, len(groups[0].scores))
    assert found == pytest.approx(as_trl(groups, losses_NT, aggregation), rel=1e-4, abs=1e-5)
    everything = make_batch(groups, BatchRules(overlong), version=0)
    assert batch.advantages == everything.advantages


def test_the_counts_show_what_was_left_out() -> None:
    group = scored_group(0, [4], made([2, 8, 8, 2], [True, False, False, True]), [1.0, 0.0, 0.0, 0.5])
    counts = make_batch([group], BatchRules(Overlong(8), truncated=LEAVE_OUT), version=0).counts
    assert (counts.num_completions, counts.num_truncated_completions, counts.num_loss_tokens) == (4, 2, 4)
    assert (counts.length_generated, counts.length_trained, counts.length_bias) == (5.0, 2.0, 0.4)
    assert (counts.masked_stale, counts.num_stale_completions, counts.num_stale_groups) == (0.0, 0, 0)


@pytest.mark.parametrize(
    ("truncated", "expected"),
    [
        (Truncated(), [1.0, 0.75, -2.0, None]),
        (LEAVE_OUT, [1.0, 0.75, -2.0, None]),
        (Truncated("zero"), [1.0, 0.0, 0.0, None]),
        (Truncated("penalty", 0.5), [1.0, 0.25, -2.5, None]),
    ],
)
def test_rewards_of_truncated_completions(truncated: Truncated, expected: list[float | None]) -> None:
    group = scored_group(0, [4], made([2, 8, 8, 8], [True, False, False, False]), [1.0, 0.75, -2.0, None])
    assert shaped_rewards(group, BatchRules(Overlong(8), truncated=truncated)) == expected


def test_a_group_of_which_only_what_is_left_out_is_young_has_nothing_to_train() -> None:
    group = scored_group(0, [4], [answer([1, 3]), cut(answer([5, 5]))], [1.0, 0.0])
    assert not is_all_masked(group, 5, 1)
    assert is_all_masked(group, 5, 1, leaves_out=LEAVE_OUT.leaves_out)


def test_an_episode_that_was_cut_is_left_out_with_all_its_paths() -> None:
    nodes = [context(-1, [3]), sampled(0, [4]), context(1, [5]), sampled(2, [6, 7]), sampled(2, [8])]
    group = episode_group(0, [episode(nodes), episode(nodes, end="max_turns")], [1.0, 0.0])
    batch = make_batch([group], BatchRules(Overlong(8), truncated=LEAVE_OUT), version=0)
    assert [sample.index for sample in batch.samples] == [CompletionIndex(0, 0)] * 2
    assert batch.advantages[CompletionIndex(0, 1)] < 0

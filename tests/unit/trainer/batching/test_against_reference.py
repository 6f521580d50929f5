"""Batches and packs of random groups equal those of a plain reference."""

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import Completion, PolicyIdentity, ScoredGroup, VersionSpan, pack_float32, pack_int32
from penstock_trainer.batching.batch import BatchRules, Overlong, Sample, make_batch, valid_samples
from penstock_trainer.batching.packing import make_packs
from penstock_trainer.batching.rank_shares import share
from tests.unit.trainer.batching.batching_reference import Row, num_rows_of, parts_of, rows_of, trie_of
from tests.unit.trainer.trainer_groups import scored_group

VERSION = 6
RULES = BatchRules(Overlong(64), with_zero_advantage=True)
MAX_LAGS = st.none() | st.integers(0, 4)
TOKENS = st.integers(0, 3) | st.just(2**31 - 1)  # few tokens, so that prefixes are shared; and the largest one


@st.composite
def completions(draw: st.DrawFn) -> Completion:
    token_ids = draw(st.lists(TOKENS, max_size=6))
    size = len(token_ids)
    cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
    return Completion(
        token_ids=pack_int32(token_ids),
        loss_mask=draw(st.none() | st.binary(min_size=size, max_size=size)),
        logprobs=pack_float32(draw(st.lists(st.floats(-9, 0, width=32), min_size=size, max_size=size))),
        spans=tuple(
            VersionSpan(PolicyIdentity(draw(st.integers(1, VERSION)), "0" * 16), *cut) for cut in pairwise(cuts)
        ),
        text="",
        finish_reason="stop",
    )


@st.composite
def batches(draw: st.DrawFn) -> list[ScoredGroup]:
    groups = []
    for number in range(draw(st.integers(0, 4))):
        answers = draw(st.lists(completions(), min_size=2, max_size=4))
        rewards = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), min_size=len(answers), max_size=len(answers)))
        groups.append(scored_group(number, draw(st.lists(TOKENS, min_size=1, max_size=3)), answers, rewards))
    return groups


def counted(groups: list[ScoredGroup], rows: list[Row]) -> list[Row]:
    """The rows of groups with at least two valid rewards."""
    enough = [b for b in range(len(groups)) if sum(row.index[0] == b for row in rows) >= 2]
    return [row for row in rows if row.index[0] in enough]


def assert_same_tokens(samples: Sequence[Sample], rows: list[Row]) -> None:
    assert [sample.index for sample in samples] == [row.index for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert tuple(sample.prompt_ids.tolist()) == row.prompt_ids
        assert tuple(sample.token_ids.tolist()) == row.token_ids
        assert tuple(sample.behaviour.tolist()) == row.behaviour
        assert tuple(sample.lags.tolist()) == row.lags
        assert tuple(sample.loss_mask.tolist()) == row.is_trained


@given(batches(), MAX_LAGS)
def test_samples_and_counts(groups: list[ScoredGroup], max_lag: int | None) -> None:
    rows = rows_of(groups, VERSION, max_lag)
    in_batch = counted(groups, rows)
    batch = make_batch(groups, RULES, version=VERSION, max_lag=max_lag)
    assert_same_tokens(batch.samples, [row for row in in_batch if any(row.is_trained)])
    for sample in batch.samples:
        group = [row for row in in_batch if row.index[0] == sample.index.group]
        assert sample.weight == 1 / (batch.counts.num_groups * len(group))
    num_loss, num_trained = sum(sum(row.is_loss) for row in in_batch), sum(sum(row.is_trained) for row in in_batch)
    counts = batch.counts
    assert (counts.num_completions, counts.num_loss_tokens) == (len(in_batch), num_loss)
    assert counts.masked_stale == pytest.approx(1 - num_trained / num_loss if num_loss else 0.0)
    assert counts.num_stale_completions == sum(any(row.is_loss) and not any(row.is_trained) for row in in_batch)
    assert math.isnan(counts.reward_mean) == (not rows)
    unmasked = [row for row in rows_of(groups, VERSION, None) if any(row.is_loss)]
    assert_same_tokens(valid_samples(groups, version=VERSION), unmasked)


@given(batches(), MAX_LAGS, st.integers(1, 40))
def test_packs(groups: list[ScoredGroup], max_lag: int | None, max_tokens: int) -> None:
    batch = make_batch(groups, RULES, version=VERSION, max_lag=max_lag)
    sample_of = {sample.index: sample for sample in batch.samples}
    parts = parts_of(counted(groups, rows_of(groups, VERSION, max_lag)), max_tokens)
    for pack, part in zip(make_packs(batch.samples, max_tokens), parts, strict=True):
        trie = trie_of(part)
        assert pack.indices == tuple(row.index for row in part)
        assert pack.token_ids_P.tolist() == trie.token_ids
        assert pack.positions_P.tolist() == trie.positions
        assert pack.subtree_end_P.tolist() == trie.subtree_end
        pairs = sorted(set(zip(trie.parents, trie.targets, strict=True)))
        assert pack.parents_R.tolist() == sorted(set(trie.parents))
        assert pack.parents_R[pack.target_parent_U].tolist() == [parent for parent, _ in pairs]
        assert pack.target_token_U.tolist() == [token for _, token in pairs]
        found = [pairs[pair] for pair in pack.target_N.tolist()]
        assert found == list(zip(trie.parents, trie.targets, strict=True))
        loss = [(number, t) for number, row in enumerate(part) for t, trained in enumerate(row.is_trained) if trained]
        assert pack.sequence_N.tolist() == [number for number, _ in loss]
        assert pack.behaviour_logprobs_N.tolist() == [part[number].behaviour[t] for number, t in loss]
        assert pack.lag_N.tolist() == [part[number].lags[t] for number, t in loss]
        samples = [sample_of[pack.indices[number]] for number, _ in loss]
        assert pack.advantage_N.tolist() == [sample.advantage for sample in samples]
        assert pack.weight_N.tolist() == pytest.approx([sample.weight for sample in samples])


@given(batches(), st.integers(1, 40), st.integers(2, 3))
def test_shares_of_ranks_hold_every_sample_once(groups: list[ScoredGroup], max_tokens: int, num_ranks: int) -> None:
    samples = make_batch(groups, RULES, version=VERSION).samples
    shares = [share(samples, max_tokens, rank, num_ranks) for rank in range(num_ranks)]
    packs = [pack for each in shares for pack in each.packs if pack.indices]
    assert sorted(index for pack in packs for index in pack.indices) == sorted(sample.index for sample in samples)
    rows = {row.index: row for row in rows_of(groups, VERSION, None)}
    assert [pack.num_rows for pack in packs] == [num_rows_of([rows[index] for index in pack.indices]) for pack in packs]
    assert {each.num_rows for each in shares} == {sum(pack.num_rows for pack in packs)}

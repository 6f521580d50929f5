"""Episodes as samples and packs: each trained token once, after its own path, with the advantage of its episode."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import Episode, ScoredGroup, unpack_float32, unpack_int32
from penstock_trainer.batching.batch import Batch, BatchRules, Overlong, Sample, make_batch, valid_samples
from penstock_trainer.batching.counts import CompletionIndex
from penstock_trainer.batching.masking import num_trained_tokens, oldest_trained_version
from penstock_trainer.batching.packing import Pack, make_packs, sorted_paths, split
from penstock_trainer.batching.paths import trained_paths
from penstock_trainer.batching.rank_shares import share
from penstock_trainer.grpo import Aggregation
from tests.unit.trainer.episode_groups import (
    NEWEST,
    branching_group,
    context,
    episode,
    episode_group,
    random_episode_groups,
    random_episodes,
    sampled,
)
from tests.unit.trainer.trainer_groups import completion, scored_group

RULES = BatchRules(Overlong(64), with_zero_advantage=True, norm_length=7)
AGGREGATIONS: tuple[Aggregation, ...] = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm")
NO_PROMPT = np.empty(0, dtype=np.int32)


class LossToken(NamedTuple):
    """A token with a loss, and all that decides its gradient."""

    owner: CompletionIndex
    prefix: tuple[int, ...]
    token: int
    behaviour: float
    lag: int
    advantage: float
    weight: float


def as_completions(groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    """The groups with one completion of as many tokens for each episode."""
    return [
        scored_group(
            number,
            [3],
            [completion([4] * each.num_loss_tokens, [-1.0] * each.num_loss_tokens) for each in group.group.episodes],
            [score.value for score in group.scores],
        )
        for number, group in enumerate(groups)
    ]


def expected_tokens(groups: Sequence[ScoredGroup], rules: BatchRules, max_lag: int | None) -> Iterator[LossToken]:
    """From the trees, token by token; advantage and weight from completions of as many tokens."""
    shares = {
        each.index: (each.advantage, each.weight)
        for each in make_batch(as_completions(groups), rules, version=0).samples
    }
    for b, group in enumerate(groups):
        for g, found in enumerate(group.group.episodes):
            for number, node in enumerate(found.nodes):
                owner = CompletionIndex(b, g)
                if owner not in shares or not node.is_trained:
                    continue
                before = [each for at in found.path(number)[:-1] for each in unpack_int32(found.nodes[at].token_ids)]
                versions = [span.policy.number for span in node.spans for _ in range(span.start, span.end)]
                ids = unpack_int32(node.token_ids)
                for t, behaviour in enumerate(unpack_float32(node.logprobs or b"")):
                    lag = NEWEST - versions[t]
                    if max_lag is None or lag <= max_lag:
                        yield LossToken(owner, (*before, *ids[:t]), ids[t], behaviour, lag, *shares[owner])


def tokens_of(packs: Sequence[Pack]) -> Iterator[LossToken]:
    """From the packs: the prefix of a loss token is its parent row and the ancestors of that row."""
    for pack in packs:
        ids, ends = pack.token_ids_P.tolist(), pack.subtree_end_P.tolist()
        pairs = pack.target_N.tolist()
        for n, pair in enumerate(pairs):
            row = int(pack.parents_R[pack.target_parent_U[pair]])
            prefix = tuple(ids[each] for each in range(row + 1) if row < ends[each])
            assert len(prefix) == int(pack.positions_P[row]) + 1
            yield LossToken(
                pack.indices[int(pack.sequence_N[n])],
                prefix,
                int(pack.target_token_U[pair]),
                float(pack.behaviour_logprobs_N[n]),
                int(pack.lag_N[n]),
                float(pack.advantage_N[n]),
                float(pack.weight_N[n]),
            )


def rounded(tokens: Iterator[LossToken]) -> Counter[LossToken]:
    return Counter(each._replace(advantage=round(each.advantage, 4), weight=round(each.weight, 6)) for each in tokens)


@given(random_episode_groups(), st.none() | st.integers(0, NEWEST), st.integers(1, 40), st.sampled_from(AGGREGATIONS))
def test_every_trained_token_has_one_loss_after_its_path_with_the_share_of_its_episode(
    groups: list[ScoredGroup], max_lag: int | None, max_tokens: int, aggregation: Aggregation
) -> None:
    rules = replace(RULES, aggregation=aggregation)
    batch = make_batch(groups, rules, version=NEWEST, max_lag=max_lag)
    packs = make_packs(batch.samples, max_tokens)
    assert rounded(tokens_of(packs)) == rounded(expected_tokens(groups, rules, max_lag))
    assert all(sample.prompt_ids.size and sample.loss_mask.any() for sample in batch.samples)


@given(random_episode_groups(), st.sampled_from(AGGREGATIONS))
def test_an_episode_weighs_as_much_as_a_completion_of_as_many_tokens(
    groups: list[ScoredGroup], aggregation: Aggregation
) -> None:
    rules = replace(RULES, aggregation=aggregation)
    batch, plain = (make_batch(each, rules, version=NEWEST) for each in (groups, as_completions(groups)))
    assert weights_of(batch) == pytest.approx(weights_of(plain))
    figures = ("num_groups", "num_completions", "num_failed_completions", "num_loss_tokens", "length_generated")
    assert [getattr(batch.counts, name) for name in figures] == [getattr(plain.counts, name) for name in figures]


def weights_of(batch: Batch) -> dict[tuple[int, int], float]:
    """The sum of the tokens' weights, by episode."""
    sums: dict[tuple[int, int], float] = {}
    for sample in batch.samples:
        sums[sample.index] = sums.get(sample.index, 0.0) + sample.weight * sample.num_loss_tokens
    return sums


@given(random_episodes(), st.none() | st.integers(0, NEWEST))
def test_counts_of_trained_tokens_are_those_of_the_paths(found: Episode, max_lag: int | None) -> None:
    paths = list(trained_paths(found, NO_PROMPT, NEWEST, max_lag))
    assert sum(int(path.loss_mask.sum()) for path in paths) == num_trained_tokens(found, NEWEST, max_lag)
    lags = [int(lag) for path in paths for lag in path.lags[path.loss_mask]]
    oldest = oldest_trained_version(found, NEWEST, max_lag)
    assert oldest == (NEWEST - max(lags) if lags else None)


@given(random_episode_groups(), st.integers(1, 40), st.integers(2, 3))
def test_ranks_share_the_paths(groups: list[ScoredGroup], max_tokens: int, num_ranks: int) -> None:
    samples = make_batch(groups, RULES, version=NEWEST).samples
    packs = [pack for rank in range(num_ranks) for pack in share(samples, max_tokens, rank, num_ranks).packs]
    assert rounded(tokens_of(packs)) == rounded(tokens_of(make_packs(samples, 4096)))


def test_the_paths_of_a_tree() -> None:
    group = branching_group()
    samples = make_batch([group], RULES, version=0).samples
    shown: list[Any] = [
        (tuple(each.index), each.prompt_ids.tolist(), each.token_ids.tolist(), each.token_ids[each.loss_mask].tolist())
        for each in samples
    ]
    assert shown == [
        ((0, 0), [4, 5, 6], [7, 2, 9, 10, 11, 12, 2, 13, 14], [7, 2, 11, 12, 2, 14]),
        ((0, 0), [4, 5, 6], [7, 2, 15, 16, 17], [16, 17]),
        ((0, 1), [20, 21], [22, 23], [22, 23]),
        ((0, 1), [4, 5, 6], [8, 2, 9, 24, 25], [8, 2, 25]),
    ]
    assert {round(each.advantage, 3) for each in samples} == {0.707, -0.707}
    assert {each.weight for each in samples} == {0.5}
    assert len(valid_samples([group], version=0)) == 4


def test_what_paths_share_is_one_row() -> None:
    """Turns of one history, an edited one and a second episode share rows; a sub-agent has rows of its own."""
    (pack,) = make_packs(make_batch([branching_group()], RULES, version=0).samples, 4096)
    # The prompt; the 1st path but its last token, which needs no row; its branch; the 2nd episode; its sub-agent.
    assert pack.num_rows == 3 + 8 + 2 + 4 + 3
    assert pack.num_rows == len(prefixes(pack))


def prefixes(pack: Pack) -> set[tuple[int, ...]]:
    """The distinct prefixes of the rows: as many as there are rows, if nothing is computed twice."""
    ids, ends = pack.token_ids_P.tolist(), pack.subtree_end_P.tolist()
    return {tuple(ids[each] for each in range(row + 1) if row < ends[each]) for row in range(len(ids))}


def test_a_compaction_computes_only_what_is_new() -> None:
    """64 turns whose history is compacted every 8: rows are the distinct tokens, not those of one row per turn."""
    nodes = [context(-1, [3] * 20)]
    for turn in range(64):
        parent = len(nodes) - 1
        if turn and turn % 8 == 0:
            nodes.append(context(0, [4 + turn % 40, 5, 6]))  # the summary replaces all turns so far
        else:
            nodes.append(context(parent, [7, 8]) if turn else context(0, [9]))
        nodes.append(sampled(len(nodes) - 1, [10 + turn % 30, 11, 12]))
    samples = make_batch([episode_group(0, [episode(nodes)] * 2, [1.0, 0.0])], RULES, version=0).samples
    (pack,) = make_packs(samples, 2**20)
    distinct = sum(node.num_tokens for node in nodes)
    assert distinct - len(nodes) <= pack.num_rows <= distinct  # ends of paths need no row
    per_turn = sum(len(unpack_ids(nodes, number)) for number, node in enumerate(nodes) if node.is_sampled)
    assert per_turn > 5 * pack.num_rows


def unpack_ids(nodes: Sequence[Any], number: int) -> list[int]:
    ids: list[int] = []
    while number != -1:
        ids = unpack_int32(nodes[number].token_ids) + ids
        number = nodes[number].parent
    return ids


def test_paths_of_one_prompt_stay_in_one_pack_if_they_fit() -> None:
    """Two tickets of two episodes with branches: a pack ends between the tickets, not within one."""
    groups = [branching_group(0), branching_group(1)]
    samples = list(make_batch(groups, RULES, version=0).samples)
    own = [replace(each, prompt_ids=each.prompt_ids + 10) if each.index.group else each for each in samples]
    paths = sorted_paths(own)
    by_prompt = Counter(path.sample.prompt_ids.tobytes() for path in paths)
    rows = max(sum(path.num_new for path in paths if path.sample.prompt_ids.tobytes() == each) for each in by_prompt)
    for plan in split(paths, rows + 5):
        ids = {path.sample.prompt_ids.tobytes() for path in plan.paths}
        assert sum(by_prompt[each] for each in ids) == len(plan.paths)


def test_an_episode_in_which_nothing_is_trained_is_no_sample() -> None:
    only_auxiliary = episode([context(-1, [3]), sampled(0, [4], auxiliary=True)])
    trained = episode([context(-1, [3]), sampled(0, [4])])
    batch = make_batch([episode_group(0, [only_auxiliary, trained], [1.0, 0.0])], RULES, version=0)
    assert [tuple(sample.index) for sample in batch.samples] == [(0, 1)]
    assert (batch.counts.num_completions, batch.counts.num_loss_tokens) == (2, 1)


def test_a_path_ends_with_the_last_token_that_it_trains() -> None:
    """What an auxiliary call reads and answers below it needs no forward pass."""
    nodes = [context(-1, [3]), sampled(0, [4]), context(1, [5]), sampled(2, [6], auxiliary=True)]
    (path,) = trained_paths(episode(nodes), NO_PROMPT, NEWEST)
    assert path.token_ids.tolist() == [4]


def loss_ids(samples: Sequence[Sample]) -> list[list[int]]:
    return [sample.token_ids[sample.loss_mask].tolist() for sample in samples]


def test_tokens_that_are_too_old_are_context_of_the_younger_ones() -> None:
    tree = episode(
        [context(-1, [3]), sampled(0, [4, 5], versions=[1, 5]), context(1, [6]), sampled(2, [7], versions=[6])]
    )
    (first, *_) = make_batch([episode_group(0, [tree, tree], [1.0, 0.0])], RULES, version=NEWEST, max_lag=1).samples
    assert (first.prompt_ids.tolist(), first.token_ids.tolist()) == ([3], [4, 5, 6, 7])
    assert loss_ids([first]) == [[5, 7]]
    assert first.lags.tolist() == [5, 1, 0, 0]

"""Shares the packs of a batch among ranks: equally many for each, of about the same size.

Invariant: every rank computes the same split of the same samples and takes its own part, so nothing needs to be sent.
Ranks have equally many packs, because all ranks together gather sharded weights pack by pack. If there are too few
packs, a rank computes a pack without loss. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from penstock_trainer.batching.batch import Sample
from penstock_trainer.batching.packing import Pack, PackPlan, Path, make_pack, sorted_paths, split

NUM_HALVINGS = 6  # bisection steps of the search for an even pack size: to 1/64 of the interval


@dataclass(frozen=True)
class RankShare:
    """The packs of one rank; `num_packs` and `num_rows` count all ranks, without packs that have no loss."""

    packs: list[Pack]
    num_packs: int
    num_rows: int


def share(samples: Sequence[Sample], max_tokens: int, rank: int, num_ranks: int) -> RankShare:
    """The packs of `rank`, of at most `max_tokens` rows each unless a single sequence is longer."""
    paths = sorted_paths(samples)
    parts = split(paths, max_tokens) if num_ranks == 1 else even_parts(paths, max_tokens, num_ranks)
    num_rounds = -(-len(parts) // num_ranks)
    own = parts if num_ranks == 1 else assign(parts, num_ranks)[rank]
    packs = [make_pack(part) for part in own]
    packs += [_without_loss() for _ in range(num_rounds - len(own))]
    return RankShare(packs, len(parts), sum(part.num_rows for part in parts))


def even_parts(paths: Sequence[Path], max_tokens: int, num_ranks: int) -> list[PackPlan]:
    """Parts of about the same size, in as few rounds over the ranks as `max_tokens` allows."""
    parts = split(paths, max_tokens)
    num_parts = -(-len(parts) // num_ranks) * num_ranks
    if not parts:
        return []
    sizes = [part.num_rows for part in parts]
    too_small, enough = sum(sizes) // num_parts, max(sizes)
    for _ in range(NUM_HALVINGS):
        middle = (too_small + enough) // 2
        smaller = split(paths, middle)
        if len(smaller) <= num_parts:
            parts, enough = smaller, middle
        else:
            too_small = middle
    return parts


def assign(parts: Sequence[PackPlan], num_ranks: int) -> list[list[PackPlan]]:
    """The largest first, to the rank with the fewest rows among those that can take another pack."""
    num_rounds = -(-len(parts) // num_ranks)
    shares: list[list[PackPlan]] = [[] for _ in range(num_ranks)]
    num_rows = [0] * num_ranks
    for part in sorted(parts, key=lambda each: -each.num_rows):
        open_ranks = [rank for rank, own in enumerate(shares) if len(own) < num_rounds]
        rank = min(open_ranks, key=num_rows.__getitem__)
        shares[rank].append(part)
        num_rows[rank] += part.num_rows
    return shares


def _without_loss() -> Pack:
    """One row without a wanted token."""
    none, nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32)
    return Pack(
        token_ids_P=torch.zeros(1, dtype=torch.int64),
        positions_P=torch.zeros(1, dtype=torch.int64),
        subtree_end_P=torch.ones(1, dtype=torch.int64),
        parents_R=none,
        target_parent_U=none,
        target_token_U=none,
        target_N=none,
        behaviour_logprobs_N=nothing,
        advantage_N=nothing,
        weight_N=nothing,
        lag_N=nothing,
        sequence_N=none,
        indices=(),
    )

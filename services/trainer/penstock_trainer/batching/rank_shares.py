"""Shares the packs of a batch among ranks: equally many for each, of about the same size.

Invariant: every rank computes the same split of the same samples and takes its own part, so nothing needs to be sent.
Ranks have equally many packs, because all ranks together gather sharded weights pack by pack. If there are too few
packs, a rank computes a pack without loss. Pure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from penstock_trainer.batching.batch import Sample
from penstock_trainer.batching.packing import PackPlan, Packs, Path, paths_by_length, sorted_paths, split, split_apart

NUM_HALVINGS = 6  # bisection steps of the search for an even pack size: to 1/64 of the interval


@dataclass(frozen=True)
class RankShare:
    """The packs of one rank; `num_packs` and `num_rows` count all ranks, without packs that have no loss."""

    packs: Packs
    num_packs: int
    num_rows: int


Split = Callable[[Sequence[Path], int], list[PackPlan]]


def share(
    samples: Sequence[Sample], max_tokens: int, rank: int, num_ranks: int, *, shares_prefixes: bool = True
) -> RankShare:
    """The packs of `rank`, of at most `max_tokens` rows each unless a single sequence is longer.

    `shares_prefixes`: sequences of a pack share the rows of their common prefix.
    """
    paths, cut = (sorted_paths(samples), split) if shares_prefixes else (paths_by_length(samples), split_apart)
    parts = cut(paths, max_tokens) if num_ranks == 1 else even_parts(paths, max_tokens, num_ranks, cut)
    num_rounds = -(-len(parts) // num_ranks)
    own = parts if num_ranks == 1 else assign(parts, num_ranks)[rank]
    return RankShare(Packs(own, num_rounds - len(own)), len(parts), sum(part.num_rows for part in parts))


def even_parts(paths: Sequence[Path], max_tokens: int, num_ranks: int, split: Split = split) -> list[PackPlan]:
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
    open_ranks = [(0, rank) for rank in range(num_ranks)]  # a heap, by rows
    for part in sorted(parts, key=lambda each: -each.num_rows):
        num_rows, rank = heappop(open_ranks)
        shares[rank].append(part)
        if len(shares[rank]) < num_rounds:
            heappush(open_ranks, (num_rows + part.num_rows, rank))
    return shares

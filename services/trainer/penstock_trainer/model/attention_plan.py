"""The plan of a trie pack's attention: rectangles of rows that together hold every pair (row, ancestor) once.

Owns the estimate of what a plan costs. Invariant: every row is query and key of exactly one piece that is causal or
masked, its own; full pieces come after all of those. Pure.

A segment is a chain of rows with equal subtree_end. It takes two pieces, itself (causal) and its descendants looking at
it (full), and each piece costs a call. If a subtree is small or bushy, one masked piece over all of it is cheaper. The
plan decides this for every subtree, and for the children of every segment together, from the leaves up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

# In scores (query row x key row). A score costs 0.095 us with 9 heads of 64 on one core, forward and backward, in
# pieces from 32 x 32 to 1000 x 1000, masked or not; a causal piece of up to 512 rows is computed as a full square.
CALL_SCORES = 500  # of one call; from 0 to 2000 the plans differ by less than 10 % in time
MERGE_SCORES = 16  # of merging one row of a full piece


@dataclass(frozen=True)
class Piece:
    """Rows [query_start, query_stop) look at rows [key_start, key_stop): at all of them, or causally, or by the mask.

    The latter two have the same rows on both sides.
    """

    kind: Literal["full", "causal", "masked"]
    query_start: int
    query_stop: int
    key_start: int
    key_stop: int


@dataclass(frozen=True)
class _Segment:
    start: int
    stop: int
    end: int  # of its subtree

    @property
    def num_descendants(self) -> int:
        return self.end - self.stop


@dataclass(frozen=True)
class _Choice:
    """The cheapest way for a segment's subtree: `subtree` as one masked piece, else `children` as one, else neither."""

    cost: float
    subtree: bool
    children: bool


def plan_pieces(subtree_end: Sequence[int]) -> list[Piece]:
    """The cheapest plan by estimate; a pack that is a single chain is one causal piece."""
    num_rows = len(subtree_end)
    if all(end == num_rows for end in subtree_end):
        return [_square("causal", 0, num_rows)]
    # A segment without rows stands for the root of all trees; row numbers of segments are unique otherwise.
    segments = [_Segment(0, 0, num_rows), *_segments(subtree_end)]
    return _pieces(segments, _choices(segments))


def _square(kind: Literal["causal", "masked"], start: int, stop: int) -> Piece:
    return Piece(kind, start, stop, start, stop)


def _segments(subtree_end: Sequence[int]) -> list[_Segment]:
    segments = []
    start = 0
    for end, rows in groupby(subtree_end):
        stop = start + sum(1 for _ in rows)
        segments.append(_Segment(start, stop, end))
        start = stop
    return segments


def _masked_cost(num_rows: int) -> float:
    return CALL_SCORES + num_rows**2 if num_rows else 0.0


def _choices(segments: Sequence[_Segment]) -> list[_Choice]:
    """From the last segment to the first, so that children come before their parent."""
    choices: list[_Choice] = []
    trees: list[tuple[int, float]] = []  # start and cost of the subtrees to the right that have no parent yet
    for segment in reversed(segments):
        each = 0.0
        while trees and trees[-1][0] < segment.end:
            each += trees.pop()[1]
        together = _masked_cost(segment.num_descendants)
        own = _masked_cost(segment.stop - segment.start)
        if segment.num_descendants and own:
            own += CALL_SCORES + segment.num_descendants * (segment.stop - segment.start + MERGE_SCORES)
        split = own + min(each, together)
        subtree = _masked_cost(segment.end - segment.start)
        choices.append(_Choice(min(subtree, split), subtree < split, together < each))
        trees.append((segment.start, choices[-1].cost))
    return choices[::-1]


def _pieces(segments: Sequence[_Segment], choices: Sequence[_Choice]) -> list[Piece]:
    squares: list[Piece] = []
    crosses: list[Piece] = []
    covered = 0  # rows whose subtree a masked piece holds
    for segment, choice in zip(segments, choices, strict=True):
        if segment.start < covered:
            continue
        if choice.subtree:
            squares.append(_square("masked", segment.start, segment.end))
            covered = segment.end
            continue
        if segment.start < segment.stop:
            squares.append(_square("causal", segment.start, segment.stop))
            if segment.num_descendants:
                crosses.append(Piece("full", segment.stop, segment.end, segment.start, segment.stop))
        if choice.children and segment.num_descendants:
            squares.append(_square("masked", segment.stop, segment.end))
            covered = segment.end
    return squares + crosses

"""Trie packing: every distinct token prefix of a pack is computed once.

A pack is the trie of its sequences, laid out in depth-first preorder. The prompt is shared by its
completions, a few-shot prefix by all prompts, and equal completions are one. Row i may look at row j
if and only if j is an ancestor of i or i itself:

    j <= i < subtree_end[j]                e.g.  "A B C" and "A B D E":   row    0 1 2 3 4
                                                                          token  A B C D E
    position = depth in the trie                                          depth  0 1 2 2 3
                                                                          end    5 5 3 5 5

Without shared prefixes this is the block-diagonal causal mask; attention.py computes it. Packing is exact for
causal models whose layers mix tokens by attention only: a row depends on its ancestors, and these are its prefix.

Other models get packs in which nothing is shared: each sequence has rows of its own, and is computed as if it were
alone (model/sequences.py). Sequences of about the same length are neighbours there: they are padded to the longest.

With router replay a row also has the experts that the engine routed its token through. Then sequences share a row only
if they agree on those, too.

So an episode's paths share what they share, whatever its order was: turns of one history, branches, sub-agents of one
system prompt, and what a compaction kept.

The log-probability of a completion's token is read at its parent, so the last one needs no row, and
only parents of loss tokens need the vocabulary projection. All work but one sort is linear in the tokens. Pure.

Shapes: P rows of a pack, R distinct parents, U distinct (parent, token) pairs, N loss tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock_trainer.batching.batch import Sample
from penstock_trainer.batching.counts import CompletionIndex
from penstock_trainer.batching.routes import OWN_ROUTE

Ints = npt.NDArray[np.int64]
MIX = 0x2545F4914F6CDD1D  # an odd number whose products, modulo 2^64, spread low bits over high ones
DRAWN = 2**24 - 1  # all bits that a float32 holds exactly
TOKEN_BITS = 32  # a (parent row, token) pair as one int64, which sorts faster than two columns


@dataclass(frozen=True)
class Pack:
    """One forward pass. Loss tokens keep the order of their samples within the pack.

    token_ids_P, positions_P, subtree_end_P: the trie. parents_R: rows to project onto the vocabulary, ascending.
    target_parent_U (index into R, ascending), target_token_U: log-probabilities wanted.
    target_N: index into U of each loss token. behaviour_logprobs_N, advantage_N, weight_N, lag_N: float32.
    sequence_N: index of the token's sample within the pack; indices: which completions of the batch these samples are;
    an episode is there once for each of its paths in this pack. paths: which of them each sample is.
    teacher_logprobs_N: float32, as a teacher's server gave them; None without one.
    experts_PW: int16, all layers' experts of each row, -1: as the model routes it; None: all as it does.

    A sequence of which all tokens but the first are wanted; the last one needs no row:

        >>> pack = pack_of_sequence([7, 8, 9, 8])
        >>> pack.token_ids_P.tolist(), pack.positions_P.tolist(), pack.subtree_end_P.tolist()
        ([7, 8, 9], [0, 1, 2], [3, 3, 3])
        >>> pack.parents_R[pack.target_parent_U].tolist(), pack.target_token_U.tolist()
        ([0, 1, 2], [8, 9, 8])

    Two completions [8, 9] and [8, 2] of the prompt [7] have one row for each of 7 and 8, and three wanted pairs of
    (parent, token): target_parent_U = [0, 1, 1], target_token_U = [8, 2, 9], target_N = [0, 2, 0, 1].
    """

    token_ids_P: Tensor
    positions_P: Tensor
    subtree_end_P: Tensor
    parents_R: Tensor
    target_parent_U: Tensor
    target_token_U: Tensor
    target_N: Tensor
    behaviour_logprobs_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    lag_N: Tensor
    sequence_N: Tensor
    indices: tuple[CompletionIndex, ...]
    paths: tuple[int, ...]
    experts_PW: Tensor | None = None
    teacher_logprobs_N: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.indices)

    @property
    def num_rows(self) -> int:
        return self.token_ids_P.numel()

    def to(self, device: torch.device) -> "Pack":
        """The pack on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def draws(pack: Pack) -> Tensor:
    """float32[N] in [0, 1): of each loss token, by the index of its completion and its position in its sequence alone.

    So every packing draws the same. Tokens of an episode at the same position of different paths share a number.
    """
    groups, completions = torch.tensor(pack.indices, dtype=torch.int64).reshape(-1, 2).T.to(pack.sequence_N.device)
    place_N = pack.positions_P[pack.parents_R[pack.target_parent_U[pack.target_N]]].long()
    mixed_N = place_N
    for part_N in (completions[pack.sequence_N], groups[pack.sequence_N]):
        mixed_N = (mixed_N ^ (mixed_N >> 15)) * MIX + part_N + 1
    mixed_N = (mixed_N ^ (mixed_N >> 13)) * MIX
    return ((mixed_N ^ (mixed_N >> 16)) & DRAWN).float() / (DRAWN + 1)


@dataclass(frozen=True, eq=False)
class Path:
    """A sample as a path of the trie.

    token_ids: those that need a row: all before the last loss token.
    num_shared: length of the prefix that it shares with the path before it.
    """

    sample: Sample
    token_ids: npt.NDArray[np.int32]
    num_shared: int = 0

    @property
    def num_new(self) -> int:
        """Rows that it adds to a pack after the path before it."""
        return self.token_ids.size - self.num_shared


@dataclass(frozen=True)
class PackPlan:
    """The paths of one pack, and its number of rows. shares: whether neighbours share the rows of their prefix."""

    paths: tuple[Path, ...]
    num_rows: int
    shares: bool = True


class Packs(Sequence[Pack]):
    """Packs of which only the plans are kept: each is made when it is asked for, and again if it is asked for again.

    A pack takes 80 bytes a token, a plan 4. num_empty: packs without loss tokens after those of the plans.
    """

    def __init__(self, plans: Sequence[PackPlan], num_empty: int = 0) -> None:
        self._plans = (*plans, *[None] * num_empty)

    def __len__(self) -> int:
        return len(self._plans)

    @overload
    def __getitem__(self, index: int) -> Pack: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Pack]: ...
    def __getitem__(self, index: int | slice) -> Pack | Sequence[Pack]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        plan = self._plans[index]
        return make_pack(plan) if plan is not None else _without_loss()

    def made_ahead(self) -> Iterator[Pack]:
        """The packs in order, each made in a thread while its user is busy with the one before it."""
        with ThreadPoolExecutor(1, thread_name_prefix="packs") as maker:
            indices = iter(range(len(self)))
            coming = [maker.submit(self.__getitem__, index) for index in islice(indices, 1)]
            while coming:
                pack = coming.pop().result()
                coming = [maker.submit(self.__getitem__, index) for index in islice(indices, 1)]
                yield pack


def make_packs(samples: Sequence[Sample], max_tokens: int) -> list[Pack]:
    """Samples as packs of at most `max_tokens` rows each, in an order that depends on the tokens only.

    Samples with the same prompt stay in one pack if they fit into one; else they are split between completions,
    and the prompt is computed once per part. A single sequence longer than `max_tokens` gets a pack of its own.
    """
    return [make_pack(part) for part in split(sorted_paths(samples), max_tokens)]


def make_separate_packs(samples: Sequence[Sample], max_tokens: int) -> list[Pack]:
    """Samples as packs that share nothing, each of at most `max_tokens` rows once all are as long as the longest."""
    return [make_pack(part) for part in split_apart(paths_by_length(samples), max_tokens)]


def pack_of_sequence(token_ids: Sequence[int]) -> Pack:
    """One sequence by itself; every token but the first is a loss token."""
    ids = np.array(token_ids, dtype=np.int32)
    num_loss = ids.size - 1
    sample = Sample(
        prompt_ids=ids[:1],
        token_ids=ids[1:],
        loss_mask=np.ones(num_loss, dtype=np.bool_),
        behaviour=np.zeros(num_loss, dtype=np.float32),
        lags=np.zeros(num_loss, dtype=np.int32),
        advantage=0.0,
        weight=0.0,
        index=CompletionIndex(0, 0),
    )
    (pack,) = make_packs([sample], ids.size)
    return pack


def sorted_paths(samples: Iterable[Sample]) -> list[Path]:
    """The samples that have a loss token, so that paths with a common prefix are neighbours."""
    paths = [_path(sample) for sample in samples if sample.loss_mask.any()]
    # Big-endian bytes of ids that are not negative sort as the sequences of ids do.
    paths.sort(key=lambda path: path.token_ids.astype(">i4").tobytes())
    return paths[:1] + [replace(path, num_shared=_num_shared(before, path)) for before, path in pairwise(paths)]


def paths_by_length(samples: Iterable[Sample]) -> list[Path]:
    """The samples that have a loss token, from the shortest to the longest, then by tokens; nothing is shared."""
    paths = [_path(sample) for sample in samples if sample.loss_mask.any()]
    paths.sort(key=lambda path: (path.token_ids.size, path.token_ids.astype(">i4").tobytes()))
    return paths


def split_apart(paths: Sequence[Path], max_tokens: int) -> list[PackPlan]:
    """The plan of each pack of `paths_by_length`: of at most `max_tokens` rows, padding included, or a single path."""
    parts: list[PackPlan] = []
    part: list[Path] = []
    for path in paths:
        if part and (len(part) + 1) * path.token_ids.size > max_tokens:
            parts.append(_plan_apart(part))
            part = []
        part.append(path)
    return [*parts, _plan_apart(part)] if part else parts


def _plan_apart(paths: Sequence[Path]) -> PackPlan:
    return PackPlan(tuple(paths), sum(path.token_ids.size for path in paths), shares=False)


def split(paths: Sequence[Path], max_tokens: int) -> list[PackPlan]:
    """The plan of each pack: consecutive paths, of at most `max_tokens` rows unless it is a single one."""
    parts: list[PackPlan] = []
    part: list[Path] = []
    num_rows = 0
    for group in _by_prompt(paths):
        num_new = sum(path.num_new for path in group)
        if part and num_rows + num_new > max_tokens:
            parts.append(PackPlan(tuple(part), num_rows))
            part, num_rows = [], 0
        for path in group:
            if part and num_rows + path.num_new > max_tokens:
                parts.append(PackPlan(tuple(part), num_rows))
                part, num_rows = [], 0
            num_rows += path.num_new if part else path.token_ids.size
            part.append(path)
    if part:
        parts.append(PackPlan(tuple(part), num_rows))
    return parts


def make_pack(part: PackPlan) -> Pack:
    """The pack of one part."""
    trie = _Trie(part)
    samples = [path.sample for path in part.paths]
    pair_U, target_N = _unique(trie.pair_N)
    parents_R, target_parent_U = _distinct(pair_U >> TOKEN_BITS)
    num_loss_S = [sample.num_loss_tokens for sample in samples]

    def spread(values_S: Sequence[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values_S, dtype=np.float32), num_loss_S))

    return Pack(
        token_ids_P=torch.from_numpy(trie.token_ids_P),
        positions_P=torch.from_numpy(trie.positions_P),
        subtree_end_P=torch.from_numpy(trie.subtree_end_P),
        parents_R=torch.from_numpy(parents_R),
        target_parent_U=torch.from_numpy(target_parent_U),
        target_token_U=torch.from_numpy(pair_U & (2**TOKEN_BITS - 1)),
        target_N=torch.from_numpy(target_N),
        behaviour_logprobs_N=_of_loss_tokens([(sample.behaviour, sample.loss_mask) for sample in samples]),
        advantage_N=spread([sample.advantage for sample in samples]),
        weight_N=spread([sample.weight for sample in samples]),
        lag_N=_of_loss_tokens([(sample.lags, sample.loss_mask) for sample in samples]),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(samples)), num_loss_S)),
        indices=tuple(sample.index for sample in samples),
        paths=tuple(sample.path for sample in samples),
        experts_PW=None if trie.experts_PW is None else torch.from_numpy(trie.experts_PW),
        teacher_logprobs_N=_teacher_logprobs(samples),
    )


def _teacher_logprobs(samples: Sequence[Sample]) -> Tensor | None:
    found = [sample.teacher for sample in samples if sample.teacher is not None]
    return torch.from_numpy(np.concatenate(found, dtype=np.float32)) if found else None


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
        paths=(),
        teacher_logprobs_N=nothing,
    )


def _path(sample: Sample) -> Path:
    last = sample.loss_mask.size - 1 - int(sample.loss_mask[::-1].argmax())
    return Path(sample, np.concatenate([sample.prompt_ids, sample.token_ids[:last]]))


def _num_shared(left: Path, right: Path) -> int:
    """Length of the common prefix: of tokens, and of the experts that they were routed through."""
    length = min(left.token_ids.size, right.token_ids.size)
    differs = left.token_ids[:length] != right.token_ids[:length]
    length = int(differs.argmax()) if differs.any() else length
    routes, others = left.sample.routes, right.sample.routes
    if routes is None or others is None:
        return length if routes is others else 0
    return routes.num_shared(others, length)


def _by_prompt(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Neighbours with the same prompt."""
    group: list[Path] = []
    for path in paths:
        num_prompt = path.sample.prompt_ids.size
        if group and (group[-1].sample.prompt_ids.size != num_prompt or path.num_shared < num_prompt):
            yield group
            group = []
        group.append(path)
    if group:
        yield group


class _Trie:
    """The rows of a part, and the (parent row, token) pair of each loss token."""

    def __init__(self, part: PackPlan) -> None:
        self.token_ids_P = np.empty(part.num_rows, dtype=np.int64)
        self.positions_P = np.empty(part.num_rows, dtype=np.int64)
        self.subtree_end_P = np.empty(part.num_rows, dtype=np.int64)
        self.pair_N = np.empty(sum(path.sample.num_loss_tokens for path in part.paths), dtype=np.int64)
        self.experts_PW = _own_routes(part)
        rows = np.empty(max(path.token_ids.size for path in part.paths), dtype=np.int64)  # of the path, by depth
        depth = num_rows = num_loss = 0
        for number, path in enumerate(part.paths):
            shared, size = path.num_shared if number and part.shares else 0, path.token_ids.size
            self.subtree_end_P[rows[shared:depth]] = num_rows
            new = slice(num_rows, num_rows + size - shared)
            rows[shared:size] = np.arange(new.start, new.stop)
            self.token_ids_P[new] = path.token_ids[shared:]
            self.positions_P[new] = np.arange(shared, size)
            if self.experts_PW is not None and path.sample.routes is not None:
                self.experts_PW[new] = path.sample.routes.rows(shared, size)
            pairs = _pairs(path.sample, rows)
            self.pair_N[num_loss : num_loss + pairs.size] = pairs
            depth, num_rows, num_loss = size, new.stop, num_loss + pairs.size
        self.subtree_end_P[rows[:depth]] = num_rows


def _own_routes(part: PackPlan) -> npt.NDArray[np.int16] | None:
    """Of each row, that the model routes it itself; None if no path has experts."""
    routes = next((path.sample.routes for path in part.paths if path.sample.routes is not None), None)
    if routes is None:
        return None
    return np.full((part.num_rows, routes.row_length), OWN_ROUTE, dtype=np.int16)


def _pairs(sample: Sample, rows: Ints) -> Ints:
    """Of a sample's loss tokens, as numbers. The parent of a completion's first token is the prompt's last."""
    parents = rows[sample.prompt_ids.size - 1 :][: sample.token_ids.size]
    loss = sample.loss_mask[: parents.size]
    return parents[loss] << TOKEN_BITS | sample.token_ids[: parents.size][loss]


def _unique(values: Ints) -> tuple[Ints, Ints]:
    """The distinct values, ascending, and the index among them of each of `values`.

    numpy's `unique` takes many times as long. These values come in long ascending runs, on which a stable sort is fast.
    """
    order = np.argsort(values, kind="stable")
    distinct, where_sorted = _distinct(values[order])
    where = np.empty_like(where_sorted)
    where[order] = where_sorted
    return distinct, where


def _distinct(ascending: Ints) -> tuple[Ints, Ints]:
    """`_unique` of values in order."""
    is_new = np.ones(ascending.size, dtype=np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=is_new[1:])
    return ascending[is_new], np.cumsum(is_new, dtype=np.int64) - 1


def _of_loss_tokens(pairs: Sequence[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]) -> Tensor:
    """float32[N]: of (values, loss mask) of each sample."""
    return torch.from_numpy(np.concatenate([values[mask] for values, mask in pairs], dtype=np.float32))

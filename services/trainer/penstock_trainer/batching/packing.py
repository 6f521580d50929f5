"""Trie packing: every distinct token prefix of a pack is computed once.

A pack is the trie of its sequences, laid out in depth-first preorder. The prompt is shared by its
completions, a few-shot prefix by all prompts, and equal completions are one. Row i may look at row j
exactly when j is an ancestor of i or i itself:

    j <= i < subtree_end[j]                e.g.  "A B C" and "A B D E":   row    0 1 2 3 4
                                                                          token  A B C D E
    position = depth in the trie                                          depth  0 1 2 2 3
                                                                          end    5 5 3 5 5

Without shared prefixes this is the block-diagonal causal mask; attention.py computes it. Packing is exact for
causal models whose layers mix tokens by attention only: a row depends on its ancestors, and these are its prefix.

The log-probability of a completion's token is read at its parent, so the last one needs no row, and
only parents of loss tokens need the vocabulary projection. Pure.

Shapes: P rows of a pack, R distinct parents, U distinct (parent, token) pairs, N loss tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock_trainer.batching.batch import Sample

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pack:
    """One forward pass. Loss tokens keep the order of their samples within the pack.

    token_ids_P, positions_P, subtree_end_P: the trie. parents_R: rows to project onto the vocabulary, ascending.
    target_parent_U (index into R, ascending), target_token_U: log-probabilities wanted.
    target_N: index into U of each loss token. behaviour_N, advantage_N, weight_N, lag_N: float32.
    sequence_N: index of the token's sample within the pack; places: of these samples, (group, completion) of the batch.
    """

    token_ids_P: Tensor
    positions_P: Tensor
    subtree_end_P: Tensor
    parents_R: Tensor
    target_parent_U: Tensor
    target_token_U: Tensor
    target_N: Tensor
    behaviour_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    lag_N: Tensor
    sequence_N: Tensor
    places: tuple[tuple[int, int], ...]

    @property
    def num_sequences(self) -> int:
        return len(self.places)

    @property
    def num_rows(self) -> int:
        return self.token_ids_P.numel()

    def to(self, device: torch.device) -> "Pack":
        """The pack on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class _Path:
    """A sample as a path of the trie: the tokens that need a row, all but the last loss token and what follows it."""

    sample: Sample
    token_ids: Ints
    sort_key: bytes


@dataclass(frozen=True)
class Part:
    """The samples of one pack, and the rows that it has."""

    samples: tuple[Sample, ...]
    num_rows: int


def make_packs(samples: Sequence[Sample], max_tokens: int) -> list[Pack]:
    """Samples as packs of at most `max_tokens` rows each, in an order that depends on the tokens only.

    Samples with the same prompt stay in one pack where they fit into one; else they are split between completions,
    and the prompt is computed once per part. A single sequence longer than `max_tokens` gets a pack of its own.
    """
    return [_pack(part) for part in _partition(_sorted_paths(samples), max_tokens)]


def pack_of_sequence(token_ids: Sequence[int]) -> Pack:
    """One sequence by itself; every token but the first is a loss token."""
    rest = tuple(token_ids[1:])
    zeros = (0,) * len(rest)
    sample = Sample(tuple(token_ids[:1]), rest, (True,) * len(rest), zeros, zeros, advantage=0.0, weight=0.0)
    (pack,) = make_packs([sample], len(token_ids))
    return pack


def split(samples: Sequence[Sample], max_tokens: int) -> list[Part]:
    """What `make_packs` puts into each pack; `make_packs` of one part's samples and rows gives its pack."""
    parts = []
    for paths in _partition(_sorted_paths(samples), max_tokens):
        previous = [None, *(path.token_ids for path in paths)]
        num_rows = sum(_new_rows(before, path) for before, path in zip(previous, paths, strict=False))
        parts.append(Part(tuple(path.sample for path in paths), num_rows))
    return parts


def _sorted_paths(samples: Sequence[Sample]) -> list[_Path]:
    return sorted((path for path in map(_path, samples) if path is not None), key=lambda path: path.sort_key)


def _path(sample: Sample) -> _Path | None:
    loss = [position for position, is_loss in enumerate(sample.loss_mask) if is_loss]
    if not loss:
        return None
    token_ids = np.array(sample.prompt_ids + sample.token_ids[: loss[-1]], dtype=np.int64)
    # Big-endian bytes of ids that are not negative sort as the sequences of ids do.
    return _Path(sample, token_ids, token_ids.astype(">i4").tobytes())


def _shared(left: Ints, right: Ints) -> int:
    """Length of the common prefix."""
    length = min(left.size, right.size)
    differs = left[:length] != right[:length]
    return int(differs.argmax()) if differs.any() else length


def _new_rows(previous: Ints | None, path: _Path) -> int:
    return path.token_ids.size - (0 if previous is None else _shared(previous, path.token_ids))


def _partition(paths: Sequence[_Path], max_tokens: int) -> Iterator[list[_Path]]:
    """Sorted paths in consecutive parts, each of at most max_tokens rows unless it is a single path."""
    part: list[_Path] = []
    num_rows = 0
    for _, same_prompt in groupby(paths, key=lambda path: path.sample.prompt_ids):
        group = list(same_prompt)
        own = [_new_rows(group[i - 1].token_ids if i else None, path) for i, path in enumerate(group)]
        if part and num_rows + sum(own[1:]) + _new_rows(part[-1].token_ids, group[0]) > max_tokens:
            yield part
            part, num_rows = [], 0
        for path in group:
            rows = _new_rows(part[-1].token_ids if part else None, path)
            if part and num_rows + rows > max_tokens:
                yield part
                part, num_rows, rows = [], 0, path.token_ids.size
            part.append(path)
            num_rows += rows
    if part:
        yield part


def _pack(paths: Sequence[_Path]) -> Pack:
    tokens: list[Ints] = []
    positions: list[Ints] = []
    parents: list[Ints] = []
    targets: list[Ints] = []
    subtree_end = np.zeros(sum(path.token_ids.size for path in paths), dtype=np.int64)
    rows = np.zeros(0, dtype=np.int64)  # rows of the current path, by depth
    previous: Ints | None = None
    num_rows = 0
    for path in paths:
        shared = 0 if previous is None else _shared(previous, path.token_ids)
        subtree_end[rows[shared:]] = num_rows
        new = np.arange(num_rows, num_rows + path.token_ids.size - shared)
        rows = np.concatenate([rows[:shared], new])
        tokens.append(path.token_ids[shared:])
        positions.append(np.arange(shared, path.token_ids.size))
        loss = np.flatnonzero(np.array(path.sample.loss_mask))
        parents.append(rows[len(path.sample.prompt_ids) + loss - 1])
        targets.append(np.array(path.sample.token_ids, dtype=np.int64)[loss])
        num_rows += new.size
        previous = path.token_ids
    subtree_end[rows] = num_rows
    parent_N, token_N = np.concatenate(parents), np.concatenate(targets)
    pairs_U2, target_N = np.unique(np.stack([parent_N, token_N], axis=1), axis=0, return_inverse=True)
    parents_R, target_parent_U = np.unique(pairs_U2[:, 0], return_inverse=True)
    samples = [path.sample for path in paths]
    repeats = [sample.num_loss_tokens for sample in samples]
    behaviour_N = [value for s in samples for value, is_loss in zip(s.behaviour, s.loss_mask, strict=True) if is_loss]
    lag_N = [value for s in samples for value, is_loss in zip(s.lags, s.loss_mask, strict=True) if is_loss]
    return Pack(
        token_ids_P=torch.from_numpy(np.concatenate(tokens)),
        positions_P=torch.from_numpy(np.concatenate(positions)),
        subtree_end_P=torch.from_numpy(subtree_end[:num_rows]),
        parents_R=torch.from_numpy(parents_R),
        target_parent_U=torch.from_numpy(target_parent_U.reshape(-1)),
        target_token_U=torch.from_numpy(pairs_U2[:, 1].copy()),
        target_N=torch.from_numpy(target_N.reshape(-1)),
        behaviour_N=torch.tensor(behaviour_N, dtype=torch.float32),
        advantage_N=torch.from_numpy(np.repeat(np.array([s.advantage for s in samples], dtype=np.float32), repeats)),
        weight_N=torch.from_numpy(np.repeat(np.array([s.weight for s in samples], dtype=np.float32), repeats)),
        lag_N=torch.tensor(lag_N, dtype=torch.float32),
        sequence_N=torch.from_numpy(np.repeat(np.arange(len(samples)), repeats)),
        places=tuple(sample.place for sample in samples),
    )

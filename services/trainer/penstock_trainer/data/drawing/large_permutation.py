"""The order of an epoch of many prompts, in four bytes of each.

Invariant: it is `penstock.seeds.permutation`, which it makes several times as fast: every run rests on that order.
"""

from array import array

import numpy as np

from penstock.seeds import GAMMA, MASK_64, start_of

CHUNK = 2**16  # random numbers that are made at once
FOUR_BYTES = 2**31


def indices(length: int, most: int = 0) -> "array[int]":
    """0, 1, ... below `length`. most: a length that the array may get, if it is larger."""
    return array("i" if max(length, most) < FOUR_BYTES else "q", range(length))


def large_permutation(seed: int, epoch: int, length: int) -> "array[int]":
    """`permutation(seed, epoch, length)`.

    >>> list(large_permutation(0, 0, 10))
    [1, 7, 6, 2, 0, 9, 8, 4, 5, 3]
    """
    order, start = indices(length), start_of(seed, epoch)
    for done in range(0, length - 1, CHUNK):
        count = min(CHUNK, length - 1 - done)
        last = length - 1 - done  # the position that swaps first
        positions = np.arange(last, last - count, -1, dtype=np.uint64)
        others = _outputs(start, done, count) % (positions + np.uint64(1))
        for i, j in zip(range(last, last - count, -1), others.tolist(), strict=True):
            order[i], order[j] = order[j], order[i]
    return order


def _outputs(start: int, first: int, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """`count` outputs of SplitMix64 from number `first` on: uint64[count], which wraps as its arithmetic does."""
    begin = np.uint64((start + (first + 1) * GAMMA) & MASK_64)
    value = begin + np.arange(count, dtype=np.uint64) * np.uint64(GAMMA)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)))

"""The encoding of differences: any pair of arrays survives it; few changes give few bytes; damage is contained."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.weights.delta_codec import ALL, BITMAP, GAPS, HEADER, Numbers, apply, encode, unchanged

DTYPES = (np.uint16, np.uint32)


def applied(old: Numbers, block: bytes) -> Numbers:
    new = old.copy()
    apply(new, memoryview(block))
    return new


@given(
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
    st.integers(1, 3000),
    st.floats(0, 1),
    st.sampled_from([1, 3, 200, 40_000, 2**31]),
)
def test_any_pair_of_arrays_comes_back(dtype: type[np.uint16], seed: int, num: int, share: float, reach: int) -> None:
    random = np.random.default_rng(seed)
    old = random.integers(0, np.iinfo(dtype).max, num, dtype, endpoint=True)
    steps = random.integers(-reach, reach, num, np.int64, endpoint=True)
    new = np.where(random.random(num) < share, (old + steps).astype(dtype), old)
    block = encode(old, new)
    assert len(block) <= HEADER.size + new.nbytes
    assert np.array_equal(applied(old, block or unchanged(num)), new)
    assert bool(block) == bool((old != new).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 65_000])
def test_each_gap_between_two_changes_comes_back(dtype: type[np.uint16], gap: int) -> None:
    old = np.zeros(70_000, dtype)
    new = old.copy()
    new[[3, 4 + gap]] = 1, np.iinfo(dtype).max  # up by one, and down by one through zero
    block = encode(old, new)
    assert block[0] == GAPS
    assert len(block) == HEADER.size + 2 + gap // 255 + 2
    assert np.array_equal(applied(old, block), new)


def test_the_kind_is_the_smallest() -> None:
    random = np.random.default_rng(0)
    old = random.integers(0, 2**16, 65_536, np.uint16)
    for share, kind, most in ((0.005, GAPS, 0.007), (0.3, BITMAP, 0.22), (1.0, BITMAP, 0.57)):
        new = np.where(random.random(len(old)) < share, old + 1, old).astype(np.uint16)
        block = encode(old, new)
        assert (block[0], len(block) < most * old.nbytes) == (kind, True)
    assert encode(old, random.permutation(old))[0] == ALL


def test_blocks_follow_each_other() -> None:
    old = np.arange(1000, dtype=np.uint16)
    new = old.copy()
    new[[0, 650, 999]] = 7, 8, 9
    parts = [(0, 300), (300, 600), (600, 1000)]
    data = b"".join(encode(old[a:b], new[a:b]) or unchanged(b - a) for a, b in parts)
    numbers = old.copy()
    assert apply(numbers, memoryview(data)) == 3
    assert np.array_equal(numbers, new)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.002, 0.2, 1.0]), st.data())
def test_damaged_blocks_never_reach_outside(seed: int, share: float, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    old = random.integers(0, 2**16, 2000, np.uint16)
    new = np.where(random.random(2000) < share, random.integers(0, 2**16, 2000, np.uint16), old)
    block = bytearray(encode(old, new) or unchanged(2000))
    guarded = np.concatenate([old, old])
    numbers = guarded[:2000]
    if data.draw(st.booleans()):
        del block[data.draw(st.integers(0, len(block) - 1)) :]
        with pytest.raises(ValueError, match="expected"):
            apply(numbers, memoryview(bytes(block)))
    else:
        block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            apply(numbers, memoryview(bytes(block)))
        except ValueError:
            pass
        else:
            assert not np.array_equal(numbers, new) or bytes(block[2:4]) != b"\0\0"  # padding only
    assert np.array_equal(guarded[2000:], old)

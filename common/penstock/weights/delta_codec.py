"""The changes between two arrays of numbers, as bytes: positions and differences, without loss.

Owns the encoding of a block. Pure. Invariant: `apply` of `encode(old, new)` to `old` gives `new`, bit for bit; bytes
that are not such an encoding give an error or other numbers, never an access outside the array, and the digests detect
wrong numbers.

    block      header | positions | differences | exceptions
    positions  gaps: one byte per change, unchanged elements since the last one; 255 means 255 and no change yet
               bitmap: one bit per element         all: none, every element is in `differences` as it is
    difference new - old as unsigned numbers that wrap, zigzag (0, -1, 1, -2 ...), in 1, 2 or 4 bytes: in bfloat16 one
               rounding step is 1 or 2. If it does not fit, the largest number of that width stands for it, and the
               full difference follows among the exceptions.

Shapes: N elements, C of them changed.
"""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]
"""uint16[N] or uint32[N]: the bits of weights."""

HEADER = struct.Struct("<BBxxIII")  # kind, bytes per difference, N, C, bytes of positions
GAPS, BITMAP, ALL = 0, 1, 2
SKIP = 255
UNSIGNED: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


def encode(old_N: Numbers, new_N: Numbers) -> bytes:
    """The block that turns `old` into `new`; the empty string if they are equal."""
    where_C = np.flatnonzero(old_N != new_N)
    if not len(where_C):
        return b""
    itemsize = new_N.itemsize
    kind, positions = _positions(where_C, len(new_N))
    width, differences = _differences(_zigzag(new_N[where_C] - old_N[where_C]), itemsize)
    if len(positions) + len(differences) >= new_N.nbytes:
        kind, width, positions, differences = ALL, itemsize, b"", new_N.tobytes()
        return HEADER.pack(kind, width, len(new_N), len(new_N), 0) + differences
    return HEADER.pack(kind, width, len(new_N), len(where_C), len(positions)) + positions + differences


def unchanged(num_elements: int) -> bytes:
    """The block that changes nothing."""
    return HEADER.pack(GAPS, 1, num_elements, 0, 0)


def apply(numbers: Numbers, data: memoryview) -> int:
    """Apply the blocks in `data` to `numbers`, in place; returns the number of changes. ValueError: not such blocks."""
    done = offset = num_changed = 0
    while offset < len(data):
        kind, width, num, changed, num_position_bytes = HEADER.unpack_from(_slice(data, offset, HEADER.size))
        if done + num > len(numbers) or changed > num or width not in UNSIGNED or width > numbers.itemsize:
            raise ValueError(f"a block of {changed} of {num} elements at element {done} of {len(numbers)}")
        offset += HEADER.size
        block_N = numbers[done : done + num]
        positions = _slice(data, offset, num_position_bytes)
        offset += num_position_bytes
        values = _slice(data, offset, width * changed)
        offset += width * changed
        if kind == ALL and width == numbers.itemsize and changed == num:
            block_N[:] = np.frombuffer(values, block_N.dtype)
        else:
            where_C = _where(kind, positions, num, changed)
            zigzag_C = np.frombuffer(values, UNSIGNED[width]).astype(block_N.dtype)
            offset += _insert_exceptions(zigzag_C, width, data, offset)
            block_N[where_C] += _unzigzag(zigzag_C)
        done += num
        num_changed += changed
    if done != len(numbers):
        raise ValueError(f"blocks of {done} elements: expected {len(numbers)}")
    return num_changed


def _positions(where_C: NDArray[np.intp], num: int) -> tuple[int, bytes]:
    gaps_C = np.diff(where_C, prepend=-1) - 1
    skips_C = gaps_C // SKIP
    num_bytes = len(where_C) + int(skips_C.sum())
    if num_bytes > num // 8:
        bits_N = np.zeros(num, np.bool_)
        bits_N[where_C] = True
        return BITMAP, np.packbits(bits_N).tobytes()
    coded = np.full(num_bytes, SKIP, np.uint8)
    coded[np.cumsum(skips_C + 1) - 1] = gaps_C - skips_C * SKIP
    return GAPS, coded.tobytes()


def _where(kind: int, positions: memoryview, num: int, changed: int) -> NDArray[np.intp]:
    coded = np.frombuffer(positions, np.uint8)
    if kind == GAPS:
        is_change = coded != SKIP
        where_C: NDArray[np.intp] = (np.cumsum(coded.astype(np.intp) + is_change) - 1)[is_change]
    elif kind == BITMAP and len(coded) == (num + 7) // 8:
        where_C = np.flatnonzero(np.unpackbits(coded, count=num))
    else:
        raise ValueError(f"positions of kind {kind} in {len(coded)} bytes for {num} elements")
    if len(where_C) != changed or (changed and where_C[-1] >= num):
        raise ValueError(f"{len(where_C)} positions among {num} elements: expected {changed}")
    return where_C


def _differences(zigzag_C: Numbers, itemsize: int) -> tuple[int, bytes]:
    """Bytes per difference, and the encoded differences and exceptions, in the width that needs the fewest bytes."""
    sizes = {}
    for width in (width for width in UNSIGNED if width < itemsize):
        num_exceptions = int(np.count_nonzero(zigzag_C >= _largest(width)))
        sizes[width] = width * len(zigzag_C) + itemsize * num_exceptions
    width = min(sizes, key=lambda each: sizes[each])
    if sizes[width] >= zigzag_C.nbytes:
        return itemsize, zigzag_C.astype(UNSIGNED[itemsize]).tobytes()
    coded = np.minimum(zigzag_C, _largest(width)).astype(UNSIGNED[width])
    exceptions = zigzag_C[zigzag_C >= _largest(width)].astype(UNSIGNED[itemsize])
    return width, coded.tobytes() + exceptions.tobytes()


def _insert_exceptions(zigzag_C: Numbers, width: int, data: memoryview, offset: int) -> int:
    """Insert the exceptions at `offset` into their positions; returns their size in bytes."""
    if width == zigzag_C.itemsize:
        return 0
    (where,) = np.nonzero(zigzag_C == _largest(width))
    num_bytes = len(where) * zigzag_C.itemsize
    zigzag_C[where] = np.frombuffer(_slice(data, offset, num_bytes), UNSIGNED[zigzag_C.itemsize])
    return num_bytes


def _largest(width: int) -> int:
    return (1 << 8 * width) - 1


def _zigzag(difference_C: Numbers) -> Numbers:
    top = 8 * difference_C.itemsize - 1
    sign_C = difference_C >> top
    zigzag_C: Numbers = (difference_C << 1) ^ (0 - sign_C).astype(difference_C.dtype)
    return zigzag_C


def _unzigzag(zigzag_C: Numbers) -> Numbers:
    difference_C: Numbers = (zigzag_C >> 1) ^ (0 - (zigzag_C & 1)).astype(zigzag_C.dtype)
    return difference_C


def _slice(data: memoryview, start: int, num_bytes: int) -> memoryview:
    if start + num_bytes > len(data):
        raise ValueError(f"{len(data)} bytes: expected {num_bytes} at {start}")
    return data[start : start + num_bytes]

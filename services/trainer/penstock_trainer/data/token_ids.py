"""Token ids in four bytes each: a run holds those of all its prompts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from penstock.contracts import pack_int32, unpack_int32


class TokenIds(Sequence[int]):
    """Ids that do not change. They equal any sequence with the same ids.

    >>> ids = TokenIds([5, 7])
    >>> ids == (5, 7), len(ids), ids[-1], ids.packed
    (True, 2, 7, b'\\x05\\x00\\x00\\x00\\x07\\x00\\x00\\x00')
    """

    __slots__ = ("packed",)

    def __init__(self, ids: Iterable[int]) -> None:
        self.packed: bytes = ids.packed if isinstance(ids, TokenIds) else pack_int32(ids)
        """Little-endian int32."""

    @classmethod
    def of_packed(cls, packed: bytes) -> "TokenIds":
        """The ids of little-endian int32."""
        ids = cls(())
        ids.packed = packed
        return ids

    def __len__(self) -> int:
        return len(self.packed) // 4

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return unpack_int32(self.packed)[index]

    def __iter__(self) -> Iterator[int]:
        return iter(unpack_int32(self.packed))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return self.packed == other.packed
        return isinstance(other, list | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(self.packed)

    def __repr__(self) -> str:
        return repr(tuple(self))

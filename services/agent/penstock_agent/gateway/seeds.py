"""With which seed each call of an episode is sampled.

Owns the hash. Invariant: it depends on what the calls are, and not on when they come. Pure.
"""

from collections import defaultdict

import xxhash

from penstock.contracts import pack_int32


class Seeds:
    """The seeds of a session's calls.

    A seed is a hash of the episode's own seed, of all tokens that the call is sent, and of the number of the sibling:
    how many calls with the same tokens are before it. So it does not depend on when calls come, nor in which order
    different ones do, and calls that are sent the same draw differently.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._takers: dict[bytes, list[int | None]] = defaultdict(list)

    def take(self, prompt_ids: bytes, taker: int) -> int:
        """63 bits. `taker`: whose seed it is."""
        digest = xxhash.xxh3_128_digest(prompt_ids)
        takers = self._takers[digest]
        sibling = takers.index(None) if None in takers else len(takers)
        takers[sibling : sibling + 1] = [taker]
        return xxhash.xxh3_64_intdigest(digest + pack_int32([sibling]), seed=self._seed % 2**64) >> 1

    def give_back(self, prompt_ids: bytes, taker: int) -> None:
        """The call has no answer: the next with the same tokens gets its seed."""
        takers = self._takers[xxhash.xxh3_128_digest(prompt_ids)]
        takers[takers.index(taker)] = None

"""Which prompts of a set leave room for the longest completion: counted while they come, one after the other.

Owns the counts and what is said of them. Invariant: they need no prompt, so that a set may be larger than the memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from penstock.errors import DataError

MOST_PLACES = 5  # of rows in one message


@dataclass(frozen=True)
class TooLong:
    """The prompts of a set that are too long: how many of how many, the places of the first ones, the longest's tokens.

    key: the set's section of the configuration.
    """

    key: str
    count: int
    num_prompts: int
    places: tuple[str, ...]
    longest: int

    def __str__(self) -> str:
        places = ", ".join([*self.places, *["..."] * (self.count > len(self.places))])
        return f"{self.count} of {self.num_prompts} in {self.key} ({self.count / self.num_prompts:.1%}: {places})"


class SetLengths(msgspec.Struct):
    """The lengths of a set's prompts, in tokens, beside the most that leaves room.

    key: the set's section of the configuration. count: those that are too long; places: of the first of them; first,
    shortest, longest: their tokens, 0 if there is none. longest_kept: of those that fit.
    """

    key: str
    max_prompt_tokens: int
    num_prompts: int = 0
    count: int = 0
    places: list[str] = []
    first: int = 0
    shortest: int = 0
    longest: int = 0
    longest_kept: int = 0

    def add(self, place: str, num_tokens: int) -> bool:
        """Count one more prompt; whether it fits."""
        self.num_prompts += 1
        if num_tokens <= self.max_prompt_tokens:
            self.longest_kept = max(self.longest_kept, num_tokens)
            return True
        self.count += 1
        self.first = self.first or num_tokens
        self.shortest = min(self.shortest or num_tokens, num_tokens)
        self.longest = max(self.longest, num_tokens)
        if len(self.places) < MOST_PLACES:
            self.places.append(place)
        return False

    def holds_for(self, max_prompt_tokens: int) -> bool:
        """Whether the same prompts would fit with another limit."""
        return self.longest_kept <= max_prompt_tokens and (not self.count or max_prompt_tokens < self.shortest)

    @property
    def too_long(self) -> TooLong | None:
        """None if all fit."""
        if not self.count:
            return None
        return TooLong(self.key, self.count, self.num_prompts, tuple(self.places), self.longest)


def require_room(sets: Sequence[SetLengths], new_tokens_key: str = "sampling.max_new_tokens") -> None:
    """DataError if prompts are too long: the first, and how many there are in each set, with the first places.

    sets: of one limit, the engine's longest sequence less the longest completion, which is the value of
    `new_tokens_key`.
    """
    found = [(lengths, too_long) for lengths in sets if (too_long := lengths.too_long)]
    if found:
        lengths, first = found[0]
        raise DataError(
            f"{first.places[0]}: the prompt has {lengths.first} tokens: expected at most {lengths.max_prompt_tokens} "
            f"(what engines generate to the end, less {new_tokens_key}). Too long: "
            f"{', '.join(str(each) for _, each in found)}; the longest has {max(each.longest for _, each in found)}. "
            f"Shorten them or leave them out (data.too_long drop does), lower {new_tokens_key}, or raise "
            "rollout.engine.context_length or rollout.engine.max_total_tokens"
        )


def require_some_left(lengths: SetLengths, new_tokens_key: str) -> None:
    """DataError if all prompts of a set are too long, so that none is left of it."""
    if lengths.count and lengths.count == lengths.num_prompts:
        raise DataError(
            f"{lengths.key}: all {lengths.count} prompts have more than {lengths.max_prompt_tokens} tokens (what "
            f"engines generate to the end, less {new_tokens_key}), and data.too_long is drop: expected at least one "
            f"that fits; lower {new_tokens_key}, raise rollout.engine.context_length or "
            "rollout.engine.max_total_tokens, or leave the set out"
        )

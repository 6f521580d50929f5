"""The group that `data_plane` moves through the queue, and how many bytes of it each service writes and reads.

Owns its content: random token ids, log-probabilities and letters, the same in every group.
"""

import random
from dataclasses import dataclass, field

from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    Ticket,
    VersionSpan,
    decode,
    encode,
    pack_float32,
    pack_int32,
)
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader, stored

POLICY = PolicyIdentity(0, "0123456789abcdef")
PROMPT_TOKENS = 128
CHARACTERS_PER_TOKEN = 4  # of English in common vocabularies


@dataclass
class Shape:
    """The size of a group, and a group of that size as a rollout server would send it."""

    group_size: int
    num_tokens: int
    completions: tuple[Completion, ...] = field(init=False)
    prompt_ids: bytes = field(init=False)

    def __post_init__(self) -> None:
        numbers = random.Random(0)
        self.prompt_ids = pack_int32(range(PROMPT_TOKENS))
        self.completions = tuple(self._completion(numbers) for _ in range(self.group_size))

    def _completion(self, numbers: random.Random) -> Completion:
        ids = pack_int32(numbers.randrange(150_000) for _ in range(self.num_tokens))
        logprobs = pack_float32(-numbers.random() for _ in range(self.num_tokens))
        text = "".join(numbers.choices("abcdefghijklmnop qrstuvwxyz\n", k=CHARACTERS_PER_TOKEN * self.num_tokens))
        span = VersionSpan(POLICY, 0, self.num_tokens)
        return Completion(ids, None, logprobs, (span,), text, "length")

    def ticket(self, number: int) -> Ticket:
        sampling = Sampling(1.0, self.num_tokens, (2,))
        seeds = tuple(range(self.group_size))
        return Ticket("train", number, 0, 0, "p" * 512, self.prompt_ids, seeds, sampling, "42", "", {})

    def rollout(self, ticket: Ticket) -> RolloutGroup:
        return RolloutGroup(ticket, self.completions, "http://127.0.0.1:30000", 1.0, 2.0)

    def scored(self, header: RolloutHeader) -> ScoredHeader:
        return ScoredHeader(header, (Score(0.5),) * self.group_size)

    @property
    def total_tokens(self) -> int:
        return self.group_size * self.num_tokens


def bytes_per_token(shape: Shape) -> dict[str, float]:
    """Bytes that each service writes or reads of a group, divided by the group's tokens."""
    ticket = shape.ticket(0)
    rollout = stored(shape.rollout(ticket))
    scored = stored(shape.scored(decode(rollout.header, RolloutHeader))).header
    completions, texts = len(rollout.parts[Part.COMPLETIONS]), len(rollout.parts[Part.TEXTS])
    found = {
        "ticket": len(encode(ticket)),
        "stored by the rollout service": len(rollout.header) + completions + texts,
        "read by the reward service": len(rollout.header) + texts,
        "stored by the reward service": len(scored),
        "read by the trainer": len(scored) + completions,
    }
    return {name: size / shape.total_tokens for name, size in found.items()}

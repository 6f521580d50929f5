"""How a group lies in the queue: a small head in a stream, and what is heavy in parts under keys of their own.

Owns how a message is taken apart and put together again. Invariant: a part is written once, with the hand-over that
first names it, and no script reads it: scripts move heads. What is put together is a consistent group or
MalformedMessageError.

    head          ticket, server, times, later scores   from stream to stream
    completions   what the trainer reads of them        8 bytes a token; until the group is committed
    texts         what reward functions read            4 bytes a token; until they are scored, of evaluations longer

"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import msgspec

from penstock.contracts.groups import (
    Completion,
    Contract,
    MalformedMessageError,
    RolloutGroup,
    Score,
    ScoredGroup,
    Ticket,
    decode,
    encode,
)


class Part(StrEnum):
    """What a group is stored as beside its header."""

    COMPLETIONS = "completions"
    TEXTS = "texts"


class RolloutHeader(Contract, frozen=True, tag_field="schema", tag="rollout-group/3"):
    """A rollout group without its completions; fields as there."""

    ticket: Ticket
    server: str
    started_at: float
    ended_at: float


class ScoredHeader(Contract, frozen=True, tag_field="schema", tag="scored-group/3"):
    """A scored group without its completions, of which there is one per score."""

    group: RolloutHeader
    scores: tuple[Score, ...]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.group.ticket.seeds):
            raise ValueError(f"{len(self.scores)} scores for {len(self.group.ticket.seeds)} seeds")


class CompletionsPart(Contract, frozen=True, tag_field="schema", tag="completions/1"):
    """The completions of a group, without their texts."""

    completions: tuple[Completion, ...]


class TextsPart(Contract, frozen=True, tag_field="schema", tag="texts/1"):
    """The texts of a group's completions, in their order."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """A message as the queue keeps it. parts: written with it; unread: those nobody reads any more once it is there."""

    head: bytes
    parts: Mapping[Part, bytes] = field(default_factory=dict)
    unread: tuple[Part, ...] = ()


def stored(message: RolloutGroup | ScoredHeader) -> Stored:
    """Take a message apart. People read the texts of evaluations only, so those of training end with the scores."""
    if isinstance(message, ScoredHeader):
        is_training = message.group.ticket.purpose == "train"
        return Stored(encode(message), unread=(Part.TEXTS,) if is_training else ())
    parts = {
        Part.COMPLETIONS: encode(CompletionsPart(message.without_text().completions)),
        Part.TEXTS: encode(TextsPart(tuple(each.text for each in message.completions))),
    }
    return Stored(encode(RolloutHeader(message.ticket, message.server, message.started_at, message.ended_at)), parts)


def texts_of(header: RolloutHeader, data: bytes | None) -> tuple[str, ...]:
    """The texts of a group from their part; None: there is none."""
    texts = _decoded(data, TextsPart, Part.TEXTS).texts
    if len(texts) != len(header.ticket.seeds):
        raise MalformedMessageError(f"{len(texts)} texts for {len(header.ticket.seeds)} seeds")
    return texts


def group_of(header: RolloutHeader, parts: Mapping[Part, bytes | None]) -> RolloutGroup:
    """A group from its parts; one to be trained has no texts."""
    completions = _decoded(parts[Part.COMPLETIONS], CompletionsPart, Part.COMPLETIONS).completions
    try:
        group = RolloutGroup(header.ticket, completions, header.server, header.started_at, header.ended_at)
    except ValueError as error:
        raise MalformedMessageError(str(error)) from error
    if header.ticket.purpose == "train":
        return group.without_text()
    texts = texts_of(header, parts[Part.TEXTS])
    named = tuple(msgspec.structs.replace(each, text=text) for each, text in zip(completions, texts, strict=True))
    return msgspec.structs.replace(group, completions=named)


def scored_group(scored: ScoredHeader, parts: Mapping[Part, bytes | None]) -> ScoredGroup:
    """What the trainer trains or evaluates."""
    return ScoredGroup(group_of(scored.group, parts), scored.scores)


P = TypeVar("P", CompletionsPart, TextsPart)


def _decoded(data: bytes | None, expected: type[P], part: Part) -> P:
    if data is None:
        raise MalformedMessageError(f"its {part} are not in the queue")
    return decode(data, expected)

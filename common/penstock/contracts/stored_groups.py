"""How a group is stored in Redis: a small header travels through the streams; the large fields have keys of their own.

Owns how a message is split into header and parts, and joined again. Invariant: a part is written once, with the
hand-over that first names it, and no script reads it: scripts move headers. A join gives a consistent group or
MalformedMessageError.

    header        ticket, server, times, later scores   from stream to stream
    completions   the trainer's input (or episodes)     8 bytes a token, and its experts with actor.router_replay; until
                                                        the group is committed
    texts         the reward functions' input           4 bytes a token; until they are scored, or, of an evaluation,
                                                        until the trainer has read them
    teacher       the trainer's input, with teacher.urls    4 bytes a token, which the reward service adds; until the
                                                        group is committed
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from penstock.contracts.groups import RolloutGroup, ScoredGroup, Ticket
from penstock.contracts.trajectories import Completion, Episode, RoutedExperts, Score, require_scores
from penstock.contracts.wire import Contract, MalformedMessageError, decode, encode


class Part(StrEnum):
    """The fields of a group that are stored outside its header."""

    COMPLETIONS = "completions"
    TEXTS = "texts"
    TEACHER = "teacher"


class RolloutHeader(Contract, frozen=True, tag_field="schema", tag="rollout-group/3"):
    """A rollout group without its trajectories; for the other fields see `RolloutGroup`.

    environment_scores: those that the environment gave to the episodes, which the reward service reads; none of
    completions.
    """

    ticket: Ticket
    server: str
    started_at: float
    ended_at: float
    environment_scores: tuple[Score, ...] = ()

    def __post_init__(self) -> None:
        expected = len(self.ticket.seeds) if self.ticket.environment else 0
        if len(self.environment_scores) != expected:
            raise ValueError(f"{len(self.environment_scores)} scores of an environment: expected {expected}")


class ScoredHeader(Contract, frozen=True, tag_field="schema", tag="scored-group/3"):
    """A scored group without its completions; for scores and functions see `ScoredGroup`."""

    group: RolloutHeader
    scores: tuple[Score, ...]
    functions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_scores(self.scores, len(self.group.ticket.seeds), self.functions)


class CompletionsPart(Contract, frozen=True, omit_defaults=True, tag_field="schema", tag="completions/1"):
    """The completions of a group, without their texts; prompt_experts: as of `RolloutGroup`."""

    completions: tuple[Completion, ...]
    prompt_experts: RoutedExperts | None = None


class EpisodesPart(Contract, frozen=True, tag_field="schema", tag="episodes/1"):
    """The episodes of a group, without their texts."""

    episodes: tuple[Episode, ...]


class TextsPart(Contract, frozen=True, tag_field="schema", tag="texts/1"):
    """The texts of a group's trajectories, in their order."""

    texts: tuple[str, ...]


class TeacherPart(Contract, frozen=True, tag_field="schema", tag="teacher/1"):
    """The log-probabilities of a teacher; logprobs: as `teacher_logprobs` of `ScoredGroup`."""

    logprobs: tuple[bytes, ...]


@dataclass(frozen=True)
class Taught:
    """A scored group, and the teacher's log-probabilities that go with it, as in `TeacherPart`."""

    scored: ScoredHeader
    logprobs: tuple[bytes, ...]


@dataclass(frozen=True)
class Stored:
    """A message as the queue stores it. parts: written with it; unread: parts that no one reads after this message."""

    header: bytes
    parts: Mapping[Part, bytes] = field(default_factory=dict)
    unread: tuple[Part, ...] = ()


def stored(message: RolloutGroup | ScoredHeader | Taught) -> Stored:
    """Split a message. Only texts of evaluations are shown to people, so texts of training are deleted once scored."""
    if isinstance(message, Taught):
        form = stored(message.scored)
        return Stored(form.header, {Part.TEACHER: encode(TeacherPart(message.logprobs))}, form.unread)
    if isinstance(message, ScoredHeader):
        is_training = message.group.ticket.purpose == "train"
        return Stored(encode(message), unread=(Part.TEXTS,) if is_training else ())
    bare = message.without_text()
    of_episodes = bool(message.ticket.environment)
    whole = EpisodesPart(bare.episodes) if of_episodes else CompletionsPart(bare.completions, bare.prompt_experts)
    parts = {
        Part.COMPLETIONS: encode(whole),
        Part.TEXTS: encode(TextsPart(tuple(each.text for each in message.trajectories))),
    }
    header = RolloutHeader(
        message.ticket,
        message.server,
        message.started_at,
        message.ended_at,
        tuple(episode.score for episode in message.episodes),
    )
    return Stored(encode(header), parts)


def texts_of(header: RolloutHeader, data: bytes | None) -> tuple[str, ...]:
    """The texts of a group from their part; None: there is none."""
    texts = _decoded(data, TextsPart, Part.TEXTS).texts
    if len(texts) != len(header.ticket.seeds):
        raise MalformedMessageError(f"{len(texts)} texts for {len(header.ticket.seeds)} seeds")
    return texts


def group_of(header: RolloutHeader, parts: Mapping[Part, bytes | None]) -> RolloutGroup:
    """A group from its parts; a training group has no texts."""
    completions: tuple[Completion, ...] = ()
    episodes: tuple[Episode, ...] = ()
    prompt_experts: RoutedExperts | None = None
    if header.ticket.environment:
        episodes = _decoded(parts[Part.COMPLETIONS], EpisodesPart, Part.COMPLETIONS).episodes
    else:
        part = _decoded(parts[Part.COMPLETIONS], CompletionsPart, Part.COMPLETIONS)
        completions, prompt_experts = part.completions, part.prompt_experts
    try:
        group = RolloutGroup(
            header.ticket, completions, header.server, header.started_at, header.ended_at, episodes, prompt_experts
        )
    except ValueError as error:
        raise MalformedMessageError(str(error)) from error
    if header.ticket.purpose == "train":
        return group.without_text()
    return group.with_texts(texts_of(header, parts[Part.TEXTS]))


def scored_group(scored: ScoredHeader, parts: Mapping[Part, bytes | None]) -> ScoredGroup:
    """The group that the trainer trains or evaluates, from its parts; one that no teacher has seen lacks its part."""
    group = group_of(scored.group, parts)
    data = parts.get(Part.TEACHER)
    logprobs = () if data is None else _decoded(data, TeacherPart, Part.TEACHER).logprobs
    try:
        return ScoredGroup(group, scored.scores, scored.functions, logprobs)
    except ValueError as error:
        raise MalformedMessageError(str(error)) from error


P = TypeVar("P", CompletionsPart, EpisodesPart, TextsPart, TeacherPart)


def _decoded(data: bytes | None, expected: type[P], part: Part) -> P:
    if data is None:
        raise MalformedMessageError(f"its {part} are not in the queue")
    return decode(data, expected)

"""The messages that travel between services: typed, frozen, versioned and packed.

Owns their shape and their wire format (msgspec structs as MessagePack maps; never pickle). Each message carries its
`schema` tag, so that an unknown or older one is refused by name. Arrays travel as little-endian bytes: token ids int32,
log-probabilities float32, optional masks uint8. A message that decodes is consistent: lengths agree, spans cover the
tokens.

A ticket gains content at each stage: Ticket -> RolloutGroup (adds completions) -> ScoredGroup (adds scores).
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from penstock.contracts.trajectories import Completion, Episode, RoutedExperts, Score, Trajectory, require_scores
from penstock.contracts.vocabulary import Purpose
from penstock.contracts.wire import Contract

EVAL_PREFIX = "e"  # of the keys of evaluation tickets, which have numbers of their own; training keys have no prefix


class Sampling(Contract, frozen=True, omit_defaults=True):
    """How completions are drawn. Temperature 0 is greedy.

    stop_token_ids, stop: tokens that end one, and strings (`penstock.stop_strings`). ignore_eos: neither the tokens nor
    the model's own end-of-text token end one. top_p, top_k, min_p, repetition_penalty: as SGLang defines them, for
    evaluation; 1, 0, 0 and 1 change nothing. Log-probabilities are of the softmax before the first three.
    """

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Ticket(Contract, frozen=True, tag_field="schema", tag="ticket/1"):
    """One draw of one prompt: everything that rollout and reward need.

    number: position in the run's order of draws, from 0; evaluation has numbers of its own.
    attempt: how often the ticket was issued before, from 0.
    policy_version: the version announced at its issue; an older server does not take it.
    prompt_ids: int32[prompt length].
    seeds: one sampling seed per completion; their count is the group size G.
    reward: "" for the run's `reward.functions`, the name of one function, or the key of a held-out set with its own.
    environment: "" for a completion of `prompt_ids`; else the agent or environment that makes an episode, of which the
    prompt has no tokens before it begins.

    >>> from penstock.contracts.wire import decode, encode, pack_int32
    >>> ticket = Ticket(
    ...     purpose="train", number=12, attempt=0, policy_version=3, prompt="2 + 2 =",
    ...     prompt_ids=pack_int32([34, 1232, 216, 34, 446]), seeds=(7, 8), sampling=Sampling(1.0, 64, (2,)),
    ...     answer="4", reward="", metadata={},
    ... )
    >>> ticket.key, ticket.num_prompt_tokens, decode(encode(ticket), Ticket) == ticket
    ('12', 5, True)
    """

    purpose: Purpose
    number: int
    attempt: int
    policy_version: int
    prompt: str
    prompt_ids: bytes
    seeds: tuple[int, ...]
    sampling: Sampling
    answer: str
    reward: str
    metadata: dict[str, Any]
    environment: str = ""

    def __post_init__(self) -> None:
        if self.number < 0 or self.attempt < 0:
            raise ValueError(f"number {self.number}, attempt {self.attempt}: expected >= 0")
        if len(self.prompt_ids) % 4 or bool(self.prompt_ids) == bool(self.environment):
            raise ValueError(
                f"prompt_ids holds {len(self.prompt_ids)} bytes, environment is {self.environment!r}: expected one of "
                "them, and int32"
            )
        if not self.seeds:
            raise ValueError("seeds is empty: expected one per completion")

    @property
    def key(self) -> str:
        """Its name in Redis: the number, with a prefix for evaluation; `read_ticket_key` is the inverse."""
        return f"{EVAL_PREFIX if self.purpose == 'eval' else ''}{self.number}"

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids) // 4


def read_ticket_key(key: str) -> tuple[Purpose, int] | None:
    """Purpose and number of the ticket with this key; None if no ticket can have it.

    >>> read_ticket_key("12"), read_ticket_key("e3"), read_ticket_key("?")
    (('train', 12), ('eval', 3), None)
    """
    purpose: Purpose = "eval" if key.startswith(EVAL_PREFIX) else "train"
    digits = key.removeprefix(EVAL_PREFIX)
    return (purpose, int(digits)) if digits.isdecimal() else None


class RolloutGroup(Contract, frozen=True, omit_defaults=True, tag_field="schema", tag="rollout-group/2"):
    """A ticket with what was sampled for it, in the order of its seeds: G completions, or G episodes.

    started_at, ended_at: Unix seconds between which the group was made on `server`. prompt_experts: of the prompt's
    tokens, if completions have theirs.
    """

    ticket: Ticket
    completions: tuple[Completion, ...]
    server: str
    started_at: float
    ended_at: float
    episodes: tuple[Episode, ...] = ()
    prompt_experts: RoutedExperts | None = None

    def __post_init__(self) -> None:
        if self.prompt_experts is not None and self.prompt_experts.num_rows != self.ticket.num_prompt_tokens:
            raise ValueError(
                f"experts of {self.prompt_experts.num_rows} tokens of a prompt of {self.ticket.num_prompt_tokens}"
            )
        what, others = ("episodes", self.completions) if self.ticket.environment else ("completions", self.episodes)
        if others:
            raise ValueError(f"a ticket with environment {self.ticket.environment!r}: expected {what} only")
        if len(self.trajectories) != len(self.ticket.seeds):
            raise ValueError(f"{len(self.trajectories)} {what} for {len(self.ticket.seeds)} seeds")

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """What was sampled, in the order of the seeds."""
        return self.episodes if self.ticket.environment else self.completions

    def with_texts(self, texts: Sequence[str]) -> "RolloutGroup":
        """The group with these texts, one for each trajectory."""
        replace = msgspec.structs.replace
        named = tuple(replace(each, text=text) for each, text in zip(self.trajectories, texts, strict=True))
        return replace(self, **{"episodes" if self.ticket.environment else "completions": named})

    def without_text(self) -> "RolloutGroup":
        """The group as the trainer needs it: a third less to move and to keep."""
        if not any(each.text for each in self.trajectories):
            return self
        return self.with_texts([""] * len(self.ticket.seeds))


class ScoredGroup(Contract, frozen=True, omit_defaults=True, tag_field="schema", tag="scored-group/2"):
    """A rollout group with one score per trajectory.

    functions: the reward functions of the scores; none in a message of a release that did not name them.
    teacher_logprobs: of a teacher that servers have (`teacher.urls`): for each trajectory float32, one of each of its
    sampled tokens, nan of those that are not trained; empty of a trajectory without a score. None of any: no server was
    asked.
    """

    group: RolloutGroup
    scores: tuple[Score, ...]
    functions: tuple[str, ...] = ()
    teacher_logprobs: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        require_scores(self.scores, len(self.group.ticket.seeds), self.functions)
        require_teacher_logprobs(self.teacher_logprobs, self.group)

    @property
    def is_taught(self) -> bool:
        """Whether each trajectory with a score has the log-probabilities of a teacher that a server has."""
        if not self.teacher_logprobs:
            return False
        found = zip(self.group.trajectories, self.scores, self.teacher_logprobs, strict=True)
        return all(logprobs or score.value is None or not each.num_loss_tokens for each, score, logprobs in found)


def require_teacher_logprobs(logprobs: Sequence[bytes], group: RolloutGroup) -> None:
    """ValueError unless there are none, or for each trajectory none or one of each sampled token."""
    if not logprobs:
        return
    if len(logprobs) != len(group.trajectories):
        raise ValueError(f"a teacher's log-probabilities of {len(logprobs)} of {len(group.trajectories)} trajectories")
    for each, data in zip(group.trajectories, logprobs, strict=True):
        if data and len(data) != 4 * each.num_tokens:
            raise ValueError(
                f"{len(data)} bytes of a teacher's log-probabilities: expected float32 of {each.num_tokens} tokens"
            )

"""Requests to an engine and its answers, in terms that fit any engine.

An answer is an error, never a completion, if its parts disagree or if it names weights that this service has not
loaded. Pure.
"""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass

from penstock.contracts import (
    Completion,
    FinishReason,
    PolicyIdentity,
    VersionSpan,
    pack_float32,
    pack_int32,
)
from penstock.contracts.trajectories import RoutedExperts
from penstock.errors import ConfigError, EngineDiedError, EngineError, WeightsError


class EngineAbsentError(EngineDiedError):
    """There is no engine, or it was ended for its weights: the request is not to blame."""

    kind = "engine_absent"


@dataclass(frozen=True)
class EngineInfo:
    """A server's description of itself. vocabulary_size is None if it is unknown."""

    name: str
    """Name and version."""
    weight_version: str
    context_length: int
    cache_tokens: int
    """Size of its key-value cache, which the running sequences share."""
    longest_sequence: int
    """Longest prompt plus completion, in tokens, that it generates to the end: see `penstock.engine_limits`."""
    vocabulary_size: int | None
    device: str
    num_ranks: int
    """Number of processes that share its model."""

    def require_room(self, max_new_tokens: int, key: str = "sampling.max_new_tokens") -> None:
        """ConfigError if not even a prompt of one token has room for its completion. key: of its length."""
        if self.longest_sequence <= max_new_tokens:
            raise ConfigError(
                f"{key} is {max_new_tokens}, and {self.name} generates at most "
                f"{self.longest_sequence} tokens with their prompt (context {self.context_length}, cache "
                f"{self.cache_tokens}): expected room for a prompt too; lower {key}, or raise "
                "rollout.engine.context_length or rollout.engine.max_total_tokens"
            )

    def require_length(self, max_tokens: int) -> None:
        """ConfigError if episodes may be longer than the engine generates to the end."""
        if self.longest_sequence < max_tokens:
            raise ConfigError(
                f"agent.max_tokens is {max_tokens}, and {self.name} generates at most {self.longest_sequence} tokens "
                f"with those before them (context {self.context_length}, cache {self.cache_tokens}): lower "
                "agent.max_tokens, or raise rollout.engine.context_length or rollout.engine.max_total_tokens"
            )


@dataclass(frozen=True)
class CompletionRequest:
    """A request for one completion, or for the rest of one."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    with_experts: bool = False


@dataclass(frozen=True)
class AnsweredSpan:
    """Tokens [start, end) and the version string that the engine reports for them."""

    weight_version: str
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """One completion as the engine answered it: token_ids int32[T] ("i"), logprobs float32[T] ("f").

    Answer(array("i", [5, 9]), array("f", [-0.5, -2]), (AnsweredSpan("3-0f1e2d3c4b5a6978", 0, 2),), "7.", "stop")
    """

    token_ids: "array[int]"
    logprobs: "array[float]"
    spans: tuple[AnsweredSpan, ...]
    text: str
    finish_reason: FinishReason
    weight_version: str = ""
    """The version that the engine served when it answered; if there are no spans, it holds for all tokens."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that the engine had in its cache."""
    experts: RoutedExperts | None = None
    """If they were asked for: of the request's prompt and of all these tokens but the last."""


GroupAnswer = tuple[Answer, ...]


def completions(
    group: GroupAnswer, known: Mapping[str, PolicyIdentity], num_prompt_tokens: int = 0
) -> tuple[Completion, ...]:
    """The group as it is handed over; WeightsError if a span names weights that this service has not loaded.

    `num_prompt_tokens`: before the answers, which is needed if they have experts.
    """
    return tuple(_completion(answer, known, num_prompt_tokens) for answer in group)


def prompt_experts(group: GroupAnswer, num_prompt_tokens: int) -> RoutedExperts | None:
    """Those of the prompt, by the first answer that has them: an engine computes a prompt once for all."""
    found = (each.experts for each in group if each.experts is not None)
    full = (each for each in found if each.num_rows >= num_prompt_tokens)
    return next((each.rows(0, num_prompt_tokens) for each in full), None)


def _completion(answer: Answer, known: Mapping[str, PolicyIdentity], num_prompt_tokens: int) -> Completion:
    spans = []
    for span in answer.spans:
        policy = known.get(span.weight_version)
        if policy is None:
            raise WeightsError(
                f"the engine reports that it sampled with weights {span.weight_version!r}, which this service has not "
                f"loaded (known: {', '.join(known)}); expected no one else to push to it"
            )
        spans.append(VersionSpan(policy, span.start, span.end))
    num_tokens = len(answer.token_ids)
    try:
        return Completion(
            token_ids=pack_int32(answer.token_ids),
            loss_mask=None,
            logprobs=pack_float32(answer.logprobs),
            spans=tuple(spans),
            text=answer.text,
            finish_reason=answer.finish_reason,
            experts=None if answer.experts is None else answer.experts.rows(num_prompt_tokens),
        )
    except ValueError as error:
        raise EngineError(
            f"the engine's version spans or experts do not fit its {num_tokens} tokens: {error}"
        ) from error

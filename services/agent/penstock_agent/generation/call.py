"""A call of the model, and what it generated: tokens in, tokens out."""

from dataclasses import dataclass

from penstock.contracts import FinishReason, Sampling, VersionSpan
from penstock.errors import EngineRejectedError


class CallRejectedError(EngineRejectedError):
    """A call that no server can answer: the fault is in the request, such as its length."""


@dataclass(frozen=True)
class Call:
    """One completion of a prompt.

    prompt_ids: int32[prompt length]. session: calls with the same one share most of their prompt, such as those of all
    episodes of a ticket. at_least_number, at_least_lease: the answer is of these weights or newer ones.
    """

    prompt_ids: bytes
    seed: int
    sampling: Sampling
    session: str
    at_least_number: int
    at_least_lease: int


@dataclass(frozen=True)
class Generated:
    """T sampled tokens.

    token_ids int32[T], logprobs float32[T], spans that cover [0, T). num_cached_tokens: of the prompt. server: its name
    in the queue.
    """

    token_ids: bytes
    logprobs: bytes
    spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    num_cached_tokens: int
    server: str

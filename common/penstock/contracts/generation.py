"""`POST /v1/generate`: a request for completions of one prompt, and the answer. Unknown keys are errors.

Owns the form of both, for the rollout service that answers and the agent service that asks. Decoded by msgspec, because
a prompt has tens of thousands of token ids.

A conversation's second call, answered while new weights came:

>>> request = GenerateRequest(prompt_ids=(5, 6, 7, 8), seeds=(3,), max_new_tokens=2, at_least=AtLeast(3, lease=1))
>>> before, after = PolicyIdentity(3, "9f86d081884c7d65"), PolicyIdentity(4, "60303ae22b998861")
>>> completion = GeneratedCompletion(
...     text=" 4", token_ids=(216, 36), logprobs=(-0.5, -0.25), finish_reason="length", cached_tokens=3,
...     spans=((spelled(before), 0, 1), (spelled(after), 1, 2)),
... )
>>> completion.spans[0], completion.version_spans() == (VersionSpan(before, 0, 1), VersionSpan(after, 1, 2))
(('3-9f86d081884c7d65', 0, 1), True)
"""

import re
from typing import Annotated

from msgspec import Meta

from penstock.contracts.groups import Sampling
from penstock.contracts.trajectories import PolicyIdentity, VersionSpan
from penstock.contracts.vocabulary import FinishReason
from penstock.contracts.weight_sources import Number
from penstock.contracts.wire import Contract, MalformedMessageError

MAX_COMPLETIONS = 256  # of one request
MOST_STOPS = 32  # SGLang refuses more
INT32 = 2**31
MAX_TEMPERATURE = 1e6  # far beyond, float32 makes it infinite

TokenId = Annotated[int, Meta(ge=0, lt=INT32)]
StopString = Annotated[str, Meta(min_length=1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class AtLeast(Contract, frozen=True):
    """The weights that an answer needs: this number, or a newer one, of this lease; or any of a higher lease."""

    number: Number
    lease: Number


class GenerateRequest(Contract, frozen=True):
    """One prompt as token ids; one completion per seed.

    at_least: the answer is only of weights that the service has loaded and the canary has confirmed, and of these or
    newer ones. None, for people: of whatever the engine holds.
    """

    prompt_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Meta(min_length=1, max_length=MAX_COMPLETIONS)] = (0,)
    temperature: Annotated[float, Meta(ge=0, le=MAX_TEMPERATURE)] = 1.0
    max_new_tokens: Annotated[int, Meta(ge=1, lt=INT32)] = 64
    stop_token_ids: tuple[TokenId, ...] = ()
    stop: Annotated[tuple[StopString, ...], Meta(max_length=MOST_STOPS)] = ()
    ignore_eos: bool = False
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, lt=INT32)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] = 1.0
    at_least: AtLeast | None = None

    @property
    def sampling(self) -> Sampling:
        """How its completions are drawn."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.__struct_fields__})


class GeneratedCompletion(Contract, frozen=True, forbid_unknown_fields=False):
    """One completion of T tokens.

    logprobs: T of the sampled tokens, after temperature, before top_p, top_k and min_p. spans: (weight version, start,
    end), which cover [0, T).
    cached_tokens: tokens of the prompt that the engine had in its cache.
    """

    text: str
    token_ids: tuple[TokenId, ...]
    logprobs: tuple[float, ...]
    spans: tuple[tuple[str, int, int], ...]
    finish_reason: FinishReason
    cached_tokens: int

    def version_spans(self) -> tuple[VersionSpan, ...]:
        """The spans, of an answer to a request with `at_least`; MalformedMessageError if one names no policy."""
        return tuple(VersionSpan(_read(version), start, end) for version, start, end in self.spans)


class GenerateAnswer(Contract, frozen=True, forbid_unknown_fields=False):
    """The completions, in the order of the seeds, and the time that they took."""

    completions: tuple[GeneratedCompletion, ...]
    seconds: float


def spelled(policy: PolicyIdentity) -> str:
    """A policy as spans name it, with its full digest."""
    return f"{policy.number}-{policy.digest}"


def _read(version: str) -> PolicyIdentity:
    found = re.fullmatch(r"(\d{1,18})-([0-9a-f]{16})", version)
    if found is None:
        raise MalformedMessageError(f"weight version {version[:80]!r}: expected <number>-<digest of 16 hex digits>")
    return PolicyIdentity(int(found[1]), found[2])

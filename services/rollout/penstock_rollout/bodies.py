"""The bodies of the rollout service's requests and answers. Unknown keys are errors."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from penstock_rollout.engine.types import Answer

MAX_COMPLETIONS = 256  # of one request for debugging
INT32 = 2**31


class Body(BaseModel):
    """Base of the bodies: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class PushRequest(Body):
    """Staged weights: their digest, where they are as files, how else they come, and the lease of their trainer."""

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    path: Annotated[str, Field(min_length=1)]
    lease: Annotated[int, Field(ge=0)]
    source: dict[str, Any] = {"transport": "disk"}
    canary: dict[str, Any] | None = None


class ServedResponse(BaseModel):
    """What is served, how long generation was paused for it, and by what.

    policy_version and checksum are null before any push; engine_starts counts the engine's starts.
    """

    policy_version: int | None
    checksum: str | None
    paused_seconds: float
    state: str
    engine: str
    engine_starts: int
    engine_device: str
    engine_num_ranks: int


class GenerateRequest(Body):
    """One prompt as token ids; one completion per seed."""

    prompt_ids: Annotated[list[Annotated[int, Field(ge=0, lt=INT32)]], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1, max_length=MAX_COMPLETIONS)] = [0]
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=INT32)]] = []


class CompletionAnswer(BaseModel):
    """One completion; spans are (weight version, start, end)."""

    text: str
    token_ids: list[int]
    logprobs: list[float]
    spans: list[tuple[str, int, int]]
    finish_reason: str


class GenerateResponse(BaseModel):
    """The completions, in the order of the seeds."""

    completions: list[CompletionAnswer]
    seconds: float


def shown(answer: Answer) -> CompletionAnswer:
    """As the debugging endpoint shows it."""
    return CompletionAnswer(
        text=answer.text,
        token_ids=list(answer.token_ids),
        logprobs=list(answer.logprobs),
        spans=[(span.weight_version, span.start, span.end) for span in answer.spans],
        finish_reason=answer.finish_reason,
    )

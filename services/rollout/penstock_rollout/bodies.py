"""The bodies of `POST /v1/generate`, for debugging. Unknown keys are errors."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from penstock_rollout.engine.types import Answer

MAX_COMPLETIONS = 256  # of one request for debugging
INT32 = 2**31
MAX_TEMPERATURE = 1e6  # far beyond, float32 makes it infinite


class GenerateRequest(BaseModel):
    """One prompt as token ids; one completion per seed."""

    model_config = ConfigDict(extra="forbid")

    prompt_ids: Annotated[list[Annotated[int, Field(ge=0, lt=INT32)]], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1, max_length=MAX_COMPLETIONS)] = [0]
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] = 1.0
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

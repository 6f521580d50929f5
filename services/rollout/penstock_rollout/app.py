"""The rollout service's HTTP side: weights are pushed here. Parses, calls and answers.

Called by `__main__`. Whatever changes state or generates needs the token where one is set.
"""

import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi import Path as PathParameter
from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from penstock.broker import Announcement
from penstock.contracts import PolicyIdentity, Sampling, pack_int32
from penstock.http import authorized, make_app
from penstock.transfer import read_group_request, read_source
from penstock_rollout.engine.answers import Answer
from penstock_rollout.engine.engine import Engine
from penstock_rollout.loaders import make_loader
from penstock_rollout.weights import Weights

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


def make_rollout_app(engine: Engine, weights: Weights, registry: CollectorRegistry, token: SecretStr | None) -> FastAPI:
    """The app of the rollout service."""
    app = make_app("penstock rollout", not_ready=lambda: not_ready(engine, weights), metrics=registry)
    guarded = [Depends(authorized(token))]

    @app.get("/v1/weight_version")
    async def weight_version() -> ServedResponse:
        return served(engine, weights)

    @app.put("/v1/weights/{version}", dependencies=guarded)
    async def put_weights(version: Annotated[int, PathParameter(ge=0)], push: PushRequest) -> ServedResponse:
        wanted = Announcement(PolicyIdentity(version, push.digest), push.path, push.lease)
        await weights.update(wanted, make_loader(read_source(push.source), engine, weights.copy))
        return served(engine, weights)

    @app.post("/v1/weights/group", dependencies=guarded)
    async def join_group(request: dict[str, Any]) -> ServedResponse:
        await weights.join_group(read_group_request(request))
        return served(engine, weights)

    @app.post("/v1/pause", dependencies=guarded)
    async def pause() -> ServedResponse:
        await weights.pause()
        return served(engine, weights)

    @app.post("/v1/resume", dependencies=guarded)
    async def resume() -> ServedResponse:
        await weights.resume()
        return served(engine, weights)

    @app.post("/v1/generate", dependencies=guarded)
    async def generate(request: GenerateRequest) -> GenerateResponse:
        engine.require_up()
        start = time.monotonic()
        sampling = Sampling(request.temperature, request.max_new_tokens, tuple(request.stop_token_ids))
        answers = await engine.client.generate(pack_int32(request.prompt_ids), tuple(request.seeds), sampling)
        return GenerateResponse(completions=[_shown(answer) for answer in answers], seconds=time.monotonic() - start)

    return app


def not_ready(engine: Engine, weights: Weights) -> str | None:
    """Why no ticket can be taken; None when one can."""
    if (reason := engine.not_ready) is not None:
        return reason
    if weights.state == "paused":
        return "generation is paused; POST /v1/resume goes on"
    if not weights.loaded:
        return "no weights were loaded yet; expected the trainer to push or announce a version"
    return None


def served(engine: Engine, weights: Weights) -> ServedResponse:
    """What the engine serves now."""
    identity = weights.identity
    return ServedResponse(
        policy_version=None if identity is None else identity.number,
        checksum=None if identity is None else identity.digest,
        paused_seconds=weights.paused_seconds,
        state=weights.state,
        engine=engine.name,
        engine_starts=engine.epoch,
        engine_device=engine.device,
        engine_num_ranks=engine.num_ranks,
    )


def _shown(answer: Answer) -> CompletionAnswer:
    return CompletionAnswer(
        text=answer.text,
        token_ids=list(answer.token_ids),
        logprobs=list(answer.logprobs),
        spans=[(span.weight_version, span.start, span.end) for span in answer.spans],
        finish_reason=answer.finish_reason,
    )

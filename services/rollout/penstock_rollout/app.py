"""The rollout service's HTTP side: weights are pushed here. Parses, calls and answers.

Calls that change state or generate need the token, if one is set.
"""

import time
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi import Path as PathParameter
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.contracts import Sampling, ServerState, pack_int32, to_body
from penstock.contracts.services import ServedWeights, read_push, version_body
from penstock.contracts.weight_sources import read_group_request
from penstock.runtime.http import authorized, make_app
from penstock_rollout.bodies import GenerateRequest, GenerateResponse, shown
from penstock_rollout.engine.engine import Engine
from penstock_rollout.weights.loaders import make_loader
from penstock_rollout.weights.updater import WeightUpdater


def make_rollout_app(
    engine: Engine, weights: WeightUpdater, registry: CollectorRegistry, token: SecretStr | None
) -> FastAPI:
    """The app of the rollout service."""
    app = make_app("penstock rollout", not_ready=lambda: not_ready(engine, weights), metrics=registry)
    guarded = [Depends(authorized(token))]

    @app.get("/v1/weight_version")
    async def weight_version() -> dict[str, Any]:
        return to_body(served(engine, weights))

    @app.put("/v1/weights/{version}", dependencies=guarded)
    async def put_weights(version: Annotated[int, PathParameter(ge=0)], push: dict[str, Any]) -> dict[str, Any]:
        wanted, source = read_push(version, push)
        await weights.update(wanted, make_loader(source, engine, weights.copy))
        return to_body(served(engine, weights))

    @app.post("/v1/weights/group", dependencies=guarded)
    async def join_group(request: dict[str, Any]) -> dict[str, Any]:
        await weights.join_group(read_group_request(request))
        return to_body(served(engine, weights))

    @app.post("/v1/pause", dependencies=guarded)
    async def pause() -> dict[str, Any]:
        await weights.pause()
        return to_body(served(engine, weights))

    @app.post("/v1/resume", dependencies=guarded)
    async def resume() -> dict[str, Any]:
        await weights.resume()
        return to_body(served(engine, weights))

    @app.post("/v1/generate", dependencies=guarded)
    async def generate(request: GenerateRequest) -> GenerateResponse:
        start = time.monotonic()
        sampling = Sampling(request.temperature, request.max_new_tokens, tuple(request.stop_token_ids))
        answers = await engine.generate(pack_int32(request.prompt_ids), request.seeds, sampling)
        return GenerateResponse(completions=[shown(answer) for answer in answers], seconds=time.monotonic() - start)

    return app


def not_ready(engine: Engine, weights: WeightUpdater) -> str | None:
    """Why no ticket can be taken; None if one can."""
    if (reason := engine.not_ready) is not None:
        return reason
    if weights.state is ServerState.PAUSED:
        return "generation is paused; POST /v1/resume resumes it"
    if weights.state is ServerState.FENCED:
        return f"no ticket is taken until the announced weights are served; the last update failed: {weights.fenced}"
    if not weights.loaded:
        return "no weights were loaded yet; expected the trainer to push or announce a version"
    return None


def served(engine: Engine, weights: WeightUpdater) -> ServedWeights:
    """What the engine serves now."""
    return ServedWeights(
        **version_body(weights.identity),
        paused_seconds=weights.paused_seconds,
        state=weights.state,
        engine=engine.name,
        engine_starts=engine.life,
        engine_device=engine.device,
        engine_num_ranks=engine.num_ranks,
    )

"""The rollout service's HTTP side: weights are pushed here. Parses, calls and answers.

Calls that change state or generate need the token, if one is set.
"""

import time
from typing import Annotated, Any

from fastapi import FastAPI
from fastapi import Path as PathParameter
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.contracts import Sampling, ServerState, pack_int32, to_body
from penstock.contracts.services import ServedWeights, read_push, read_turn, version_body
from penstock.contracts.weight_sources import MAX_NUMBER, read_group_request
from penstock.errors import WeightsBusyError, WeightsConflictError
from penstock.runtime.http import make_app
from penstock_rollout.bodies import GenerateRequest, GenerateResponse, shown
from penstock_rollout.engine.engine import Engine
from penstock_rollout.weights.loaders import make_loader
from penstock_rollout.weights.turns import Turns
from penstock_rollout.weights.updater import WeightUpdater

MAX_PUSH_BYTES = 2**25  # the names and shapes of 200 000 tensors
MAX_GENERATE_BYTES = 2**23  # a prompt of a million tokens
ASLEEP = "the engine sleeps: it is the trainer's turn on the GPU (trainer.take_turns)"


def make_rollout_app(
    engine: Engine,
    weights: WeightUpdater,
    registry: CollectorRegistry,
    token: SecretStr | None,
    turns: Turns | None = None,
) -> FastAPI:
    """The app of the rollout service; `turns`: with `trainer.take_turns`."""
    app = make_app(
        "penstock rollout",
        not_ready=lambda: not_ready(engine, weights),
        metrics=registry,
        token=token,
        body_bytes={"/v1/weights/{version}": MAX_PUSH_BYTES, "/v1/generate": MAX_GENERATE_BYTES},
    )

    @app.get("/v1/weight_version")
    async def weight_version() -> dict[str, Any]:
        return to_body(served(engine, weights))

    @app.put("/v1/weights/{version}")
    async def put_weights(
        version: Annotated[int, PathParameter(ge=0, le=MAX_NUMBER)], push: dict[str, Any]
    ) -> dict[str, Any]:
        wanted, source = read_push(version, push)
        await weights.update(wanted, make_loader(source, engine, weights.copy))
        return to_body(served(engine, weights))

    @app.post("/v1/weights/group")
    async def join_group(request: dict[str, Any]) -> dict[str, Any]:
        await weights.join_group(read_group_request(request))
        return to_body(served(engine, weights))

    _add_pauses(app, engine, weights, turns)

    @app.post("/v1/generate")
    async def generate(request: GenerateRequest) -> GenerateResponse:
        if weights.asleep:
            raise WeightsBusyError(ASLEEP)
        start = time.monotonic()
        sampling = Sampling(request.temperature, request.max_new_tokens, tuple(request.stop_token_ids))
        answers = await engine.generate(pack_int32(request.prompt_ids), request.seeds, sampling)
        return GenerateResponse(completions=[shown(answer) for answer in answers], seconds=time.monotonic() - start)

    return app


def _add_pauses(app: FastAPI, engine: Engine, weights: WeightUpdater, turns: Turns | None) -> None:
    """The requests that stop generation, or let it go on."""

    @app.post("/v1/pause")
    async def pause() -> dict[str, Any]:
        await weights.pause()
        return to_body(served(engine, weights))

    @app.post("/v1/resume")
    async def resume() -> dict[str, Any]:
        await weights.resume()
        return to_body(served(engine, weights))

    @app.post("/v1/sleep")
    async def sleep(request: dict[str, Any]) -> dict[str, Any]:
        turn = read_turn(request)
        if turns is None:
            raise WeightsConflictError(
                "this service was started without trainer.take_turns; expected it as the trainer's"
            )
        await turns.sleep(turn)
        return to_body(served(engine, weights))


def not_ready(engine: Engine, weights: WeightUpdater) -> str | None:
    """Why no ticket can be taken; None if one can."""
    if (reason := engine.not_ready) is not None:
        return reason
    if weights.state is ServerState.ASLEEP:
        return ASLEEP
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

"""The rollout service's HTTP side: weights are pushed here, and agents call the model. Parses, calls and answers.

Calls that change state or generate need the token, if one is set.
"""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi import Path as PathParameter
from msgspec.structs import replace
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.contracts import MalformedMessageError, from_body, to_body
from penstock.contracts.generation import GenerateRequest
from penstock.contracts.services import ServedWeights, read_doubt, read_push, read_turn, version_body
from penstock.contracts.weight_sources import MAX_NUMBER, read_group_request
from penstock.errors import WeightsConflictError
from penstock.runtime.bodies import CLIENT_GONE
from penstock.runtime.connections import client_gone
from penstock.runtime.error_answers import error_response
from penstock.runtime.http import make_app
from penstock.runtime.relay_route import add_relay
from penstock_rollout.calls import Calls
from penstock_rollout.engine.engine import Engine
from penstock_rollout.weights.loaders import RelayLoader, make_loader
from penstock_rollout.weights.turns import Turns
from penstock_rollout.weights.updater import WeightUpdater

MAX_PUSH_BYTES = 2**25  # the names and shapes of 200 000 tensors
MAX_GENERATE_BYTES = 2**23  # a prompt of a million tokens

T = TypeVar("T")


def make_rollout_app(
    engine: Engine,
    weights: WeightUpdater,
    calls: Calls,
    registry: CollectorRegistry,
    token: SecretStr | None,
    turns: Turns | None = None,
) -> FastAPI:
    """The app of the rollout service; `turns`: with `trainer.take_turns`."""
    app = make_app(
        "penstock rollout",
        not_ready=lambda: calls.not_ready,
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
        loader = make_loader(source, engine, weights.copy, weights.relayed)
        await weights.update(wanted, loader)
        left = loader.left if isinstance(loader, RelayLoader) else ()
        return to_body(replace(served(engine, weights), left=left))

    @app.post("/v1/weights/group")
    async def join_group(request: dict[str, Any]) -> dict[str, Any]:
        await weights.join_group(read_group_request(request))
        return to_body(served(engine, weights))

    if weights.relayed is not None:
        add_relay(app, weights.relayed.relay)

    @app.post("/v1/weights/doubt")
    async def doubt(request: dict[str, Any]) -> dict[str, Any]:
        seen = read_doubt(request)
        await weights.doubt(seen.lease, seen.why)
        return to_body(served(engine, weights))

    _add_pauses(app, engine, weights, turns)

    @app.post("/v1/generate")
    async def generate(request: Request) -> Response:
        try:
            wanted = from_body(await request.body(), GenerateRequest)
        except MalformedMessageError as error:
            return error_response(422, "invalid_request", str(error))
        answer = await _unless_gone(request, calls.answer(wanted))
        if answer is None:
            return Response(status_code=CLIENT_GONE)
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return app


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`. If the client disconnects it is cancelled, so that nothing computes for nobody: None."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(client_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


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

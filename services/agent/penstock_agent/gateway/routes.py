"""The routes that agents call: parse, ask the session, answer. Errors have OpenAI's form.

Each is served twice: below /v1 the key comes as `Authorization: Bearer`, below /s/<key>/v1 in the path, for clients
whose API key cannot be set. Nothing here logs a key or what a request holds.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request, Response

from penstock.errors import CallRefusedError
from penstock_agent.gateway import answers
from penstock_agent.gateway.answers import ChatAnswer, TokenText
from penstock_agent.gateway.exchange import KEEP_ALIVE_SECONDS, Exchange
from penstock_agent.gateway.keys import bearer
from penstock_agent.gateway.refusals import GatewayError, error_body
from penstock_agent.gateway.requests import read_chat, read_reward
from penstock_agent.gateway.session import CallMetrics, Session
from penstock_agent.gateway.sessions import Sessions

log = logging.getLogger(__name__)

MAX_CHAT_BYTES = 2**25  # the history of a long episode, with its tools
PREFIXES = ("", "/s/{key}")
CHAT = "/v1/chat/completions"

OWN_KEYS = ("/v1/", "/s/")
"""Beginnings of the paths whose requests have a key of their own, and not the run's token."""
BODY_BYTES: Mapping[str, int] = {f"{prefix}{CHAT}": MAX_CHAT_BYTES for prefix in PREFIXES}
"""The longest bodies, for `make_app`."""

Act = Callable[[Session, Request], Awaitable[Response]]
Handler = Callable[[Request], Awaitable[Response]]


def add_gateway(
    app: FastAPI,
    sessions: Sessions,
    *,
    model: str,
    text_of: TokenText,
    metrics: CallMetrics,
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS,
) -> None:
    """Add the routes to an app that was made with OWN_KEYS and BODY_BYTES. model: its name in answers. text_of: a
    token's text. keep_alive_seconds: between two signs of life of a stream whose answer is not there yet.
    """
    gateway = _Gateway(sessions, model, text_of, metrics, keep_alive_seconds)
    for prefix in PREFIXES:
        for method, path, act in (
            ("POST", CHAT, gateway.chat),
            ("GET", "/v1/models", gateway.models),
            ("GET", "/v1/models/{model:path}", gateway.model),
            ("PUT", "/v1/reward", gateway.reward),
        ):
            app.add_api_route(f"{prefix}{path}", gateway.handler(act), methods=[method], include_in_schema=False)
        app.add_api_route(
            f"{prefix}/v1/{{rest:path}}",
            gateway.unknown,
            methods=["GET", "POST", "PUT", "DELETE"],
            include_in_schema=False,
        )


class _Gateway:
    def __init__(
        self, sessions: Sessions, model: str, text_of: TokenText, metrics: CallMetrics, keep_alive_seconds: float
    ) -> None:
        self._sessions = sessions
        self._model = model
        self._text_of = text_of
        self._metrics = metrics
        self._keep_alive_seconds = keep_alive_seconds
        self._created = int(time.time())
        self._stops: dict[tuple[int, ...], frozenset[str]] = {}  # of training and of evaluation

    def handler(self, act: Act) -> Handler:
        """What a route calls: finds the session, and answers errors."""

        async def handle(request: Request) -> Response:
            try:
                key = request.path_params.get("key") or bearer(request.headers.get("authorization", ""))
                return await act(self._sessions.find(key), request)
            except (GatewayError, CallRefusedError, HTTPException) as error:
                return self._answer(error)

        return handle

    async def chat(self, session: Session, request: Request) -> Response:
        data = await request.body()
        asked, shown = read_chat(data, request.headers, session.sampling, self._stops_of(session))
        call = session.ask(asked)

        def parts(answer: ChatAnswer) -> Any:
            if shown.stream:
                return answers.events(answer, self._model, shown, self._text_of)
            return [answers.body(answer, self._model, shown, self._text_of)]

        return Exchange(
            call,
            stream=shown.stream,
            shown=parts,
            failed=self._failure,
            delivered=lambda: session.delivered(call),
            keep_alive_seconds=self._keep_alive_seconds,
        )

    async def models(self, session: Session, request: Request) -> Response:
        return _json({"object": "list", "data": [self._described()]})

    async def model(self, session: Session, request: Request) -> Response:
        wanted = request.path_params["model"]
        if wanted != self._model:
            message = f"there is no model {wanted[:80]!r} here; expected {self._model!r}"
            return _json(error_body(message, kind="invalid_request_error", code="model_not_found"), 404)
        return _json(self._described())

    async def reward(self, session: Session, request: Request) -> Response:
        session.set_reward(read_reward(await request.body()))
        return _json({"reward": session.reward})

    async def unknown(self, request: Request) -> Response:
        """Say what is served, in the form that clients read."""
        message = (
            f"{request.method} /v1/{request.path_params['rest'][:80]} is not served; expected POST "
            "/v1/chat/completions, GET /v1/models or PUT /v1/reward"
        )
        return _json(error_body(message, kind="invalid_request_error", code="unknown_url"), 404)

    def _stops_of(self, session: Session) -> frozenset[str]:
        """The texts of the tokens that end an answer."""
        token_ids = session.sampling.stop_token_ids
        if token_ids not in self._stops:
            self._stops[token_ids] = frozenset(map(self._text_of, token_ids))
        return self._stops[token_ids]

    def _described(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "penstock"}

    def _answer(self, error: Exception) -> Response:
        status, body = self._failure(error)
        return _json(body, status)

    def _failure(self, error: Exception) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer to an error."""
        status, kind, code, message, param = 500, "server_error", "internal_error", "", None
        if isinstance(error, GatewayError):
            status, kind, code, message, param = error.status, error.type, error.code, str(error), error.param
        elif isinstance(error, CallRefusedError):
            status, kind, code, message, param = 400, "invalid_request_error", error.kind, str(error), "messages"
        elif isinstance(error, HTTPException):
            status, kind, code, message = error.status_code, "invalid_request_error", "body", str(error.detail)
        else:
            message = f"the gateway failed by a defect ({type(error).__name__}); its log has more"
        self._metrics.request_refused(code)
        return status, error_body(message, kind=kind, code=code, param=param)


def _json(value: dict[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")

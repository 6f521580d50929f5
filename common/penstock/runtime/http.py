"""The common HTTP side of all services: health, readiness, metrics, token, errors.

Owns `GET /health`, `/ready`, `/metrics` and the mapping of Penstock's errors to status codes, so that each service's
app only parses and calls.
"""

import os
import secrets
import socket
from collections.abc import Callable

from fastapi import FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import SecretStr
from starlette.exceptions import HTTPException as StarletteHTTPException

from penstock.errors import (
    ConfigError,
    DataError,
    EngineError,
    LeaseLostError,
    PenstockError,
    RewardError,
    RewardUnavailableError,
    WeightsBusyError,
    WeightsConflictError,
    WeightsError,
    WeightsMismatchError,
)

RETRY_AFTER_SECONDS = 1  # a push takes about this long

# The first class that fits decides: subclasses come before their bases.
STATUS_OF_ERROR: tuple[tuple[type[Exception], int], ...] = (
    (WeightsConflictError, 409),
    (LeaseLostError, 409),
    (WeightsBusyError, 503),
    (WeightsMismatchError, 502),
    (WeightsError, 422),
    (EngineError, 502),
    (RewardUnavailableError, 503),
    (RewardError, 422),
    (ConfigError, 422),
    (DataError, 422),
    (TimeoutError, 504),
    (PenstockError, 500),
)


def make_app(title: str, *, not_ready: Callable[[], str | None], metrics: CollectorRegistry) -> FastAPI:
    """An app with the routes that all services share; `not_ready` gives the reason why the service cannot work yet."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def ready() -> Response:
        reason = not_ready()
        if reason is None:
            return JSONResponse({"status": "ready"})
        return error_response(503, "not_ready", reason)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(PenstockError)
    @app.exception_handler(TimeoutError)
    async def on_error(request: Request, error: Exception) -> Response:
        status = next(status for kind, status in STATUS_OF_ERROR if isinstance(error, kind))
        kind = error.kind if isinstance(error, PenstockError) else "timeout"
        return error_response(status, kind, str(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        return error_response(422, "invalid_request", "; ".join(problems))

    @app.exception_handler(StarletteHTTPException)  # the base: an unknown path raises it
    async def on_refused(request: Request, error: StarletteHTTPException) -> Response:
        return error_response(error.status_code, "refused", str(error.detail))

    return app


def error_response(status: int, kind: str, detail: str) -> JSONResponse:
    """The one form of every error answer."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == 503 else None
    return JSONResponse({"error": kind, "detail": detail}, status_code=status, headers=headers)


def authorized(token: SecretStr | None) -> Callable[..., None]:
    """A FastAPI dependency that answers 401 without `Authorization: Bearer <token>`, if a token is set."""

    def check(authorization: str = Header(default="")) -> None:
        if token is None:
            return
        expected = f"Bearer {token.get_secret_value()}"
        if not secrets.compare_digest(authorization.encode(), expected.encode()):
            raise HTTPException(401, "no valid bearer token; expected the one of the key `token` (PENSTOCK_TOKEN)")

    return check


def auth_headers(token: SecretStr | None) -> dict[str, str]:
    """The header that `authorized` accepts."""
    return {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}


def transport_fault(error: Exception) -> str:
    """Why a request got no answer: the kind of the error and the system's reason.

    Without the library's text, which may repeat a header with the token in it: the reason is shown to everyone.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__ or cause.__context__
    kind = type(error).__name__
    if isinstance(cause, socket.gaierror):
        return f"{kind} (no such host)"
    return f"{kind} ({os.strerror(cause.errno)})" if isinstance(cause, OSError) and cause.errno else kind

"""The common HTTP side of all services: health, readiness, metrics, token, limits, errors.

Owns `GET /health`, `/ready`, `/metrics` and what surrounds every route, so that each service's app only parses and
calls.
"""

from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import SecretStr
from starlette.exceptions import HTTPException as StarletteHTTPException

from penstock.errors import PenstockError
from penstock.runtime.bodies import bounded_routes
from penstock.runtime.error_answers import answer_to, error_response
from penstock.runtime.guard import Guard


def make_app(
    title: str,
    *,
    not_ready: Callable[[], str | None],
    metrics: CollectorRegistry,
    token: SecretStr | None = None,
    body_bytes: Mapping[str, int] | None = None,
    own_keys: tuple[str, ...] = (),
) -> FastAPI:
    """An app with the routes that all services share; `not_ready` gives the reason why the service cannot work yet.

    Every route that is added to it needs the token, if there is one, unless it is a read, or its path begins with one
    of `own_keys`: then it checks a key of its own.
    `body_bytes`: the longest body of a route, by its path, if it needs more than `MAX_BODY_BYTES`.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, token=token, own_keys=own_keys)
    app.router.route_class = bounded_routes(body_bytes or {})

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
        return answer_to(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        problems = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        return error_response(422, "invalid_request", "; ".join(problems))

    @app.exception_handler(StarletteHTTPException)  # the base: an unknown path raises it
    async def on_refused(request: Request, error: StarletteHTTPException) -> Response:
        return error_response(error.status_code, "refused", str(error.detail))

    return app

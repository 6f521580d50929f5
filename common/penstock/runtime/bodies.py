"""Bodies of requests: how long one may be, how long it may take, and which JSON is taken.

Invariant: no more than its route's limit of a body is ever held, and what an endpoint is given has no value that cannot
be written as JSON or UTF-8 again: no NaN, no infinity, no lone surrogate.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import msgspec
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

MAX_BODY_BYTES = 2**16  # of a route that names no limit: what a person writes
BODY_SECONDS = 60.0  # for the longest body over a slow link
CLIENT_GONE = 499  # for a log: nobody reads that answer

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def bounded_routes(limits: Mapping[str, int]) -> type[APIRoute]:
    """The class of routes whose bodies are bounded. `limits`: in bytes, by path, for those that need more."""

    class BoundedRoute(APIRoute):
        """A route that reads its body itself, in place of FastAPI."""

        def get_route_handler(self) -> Handler:
            handle, limit = super().get_route_handler(), limits.get(self.path, MAX_BODY_BYTES)

            async def bounded(request: Request) -> Response:
                return await handle(_BoundedRequest(request, limit))

            return bounded

    return BoundedRoute


class _BoundedRequest(Request):
    def __init__(self, request: Request, max_bytes: int) -> None:
        super().__init__(request.scope, request.receive)
        self._max_bytes = max_bytes

    async def body(self) -> bytes:
        """HTTPException 413 if it is too long, 408 if it takes too long, 499 if the client leaves before its end."""
        if not hasattr(self, "_body"):
            declared = self.headers.get("content-length", "")
            if declared.isdecimal() and int(declared) > self._max_bytes:
                raise self._too_long(declared)
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    self._body = await self._read()
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {BODY_SECONDS:g} s; expected it by then") from None
            except ClientDisconnect:
                raise HTTPException(CLIENT_GONE, "the client left before the end of its body") from None
        return self._body

    async def _read(self) -> bytes:
        read = bytearray()
        async for chunk in self.stream():
            read += chunk
            if len(read) > self._max_bytes:
                raise self._too_long(f"more than {self._max_bytes}")
        return bytes(read)

    def _too_long(self, seen: str) -> HTTPException:
        return HTTPException(413, f"the body has {seen} bytes; expected at most {self._max_bytes} here")

    async def json(self) -> Any:
        """HTTPException 422 if it is none."""
        try:
            return msgspec.json.decode(await self.body())
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise HTTPException(
                422, f"the body is no JSON that can be used ({error}); expected one value, without NaN and in UTF-8"
            ) from None

"""The answer to one HTTP request: from the wait for the model to the last byte.

Owns what "delivered" means: all bytes of the answer were sent, and the client had not left before the last of them.
Invariant: a client that leaves ends this exchange only; its call goes on, for the client may come again.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.runtime.connections import client_gone
from penstock_agent.gateway.answers import KEEP_ALIVE, ChatAnswer, error_event
from penstock_agent.gateway.calls import Call

KEEP_ALIVE_SECONDS = 10.0
TURNS_OF_THE_LOOP = 3  # after them, a connection that the other side has closed is known to be


class Exchange(Response):
    """Answers when the call has been answered."""

    def __init__(
        self,
        call: Call,
        *,
        stream: bool,
        shown: Callable[[ChatAnswer], Iterable[bytes]],
        failed: Callable[[Exception], tuple[int, dict[str, Any]]],
        delivered: Callable[[], None],
        keep_alive_seconds: float,
    ) -> None:
        """shown: the parts of the body. failed: status and body of an error. delivered: called at most once.

        keep_alive_seconds: between two signs of life of a stream.
        """
        super().__init__()
        self._call = call
        self._stream = stream
        self._shown = shown
        self._error = failed
        self._delivered = delivered
        self._keep_alive_seconds = keep_alive_seconds
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.TaskGroup() as group:
            gone = group.create_task(client_gone(receive))
            with self._call.waited_for():
                if await self._wait(gone, send):
                    await self._send(gone, send)
            gone.cancel()

    async def _wait(self, gone: "asyncio.Task[None]", send: Send) -> bool:
        """Until there is an answer: True; or until the client has gone: False."""
        answer = self._call.answer
        either: set[asyncio.Future[Any]] = {answer, gone}
        patience = self._keep_alive_seconds if self._stream else None
        while not answer.done() and not gone.done():
            done, _ = await asyncio.wait(either, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                await self._begin(send)
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        return not gone.done()

    async def _send(self, gone: "asyncio.Task[None]", send: Send) -> None:
        error = self._call.answer.exception()
        if error is None:
            body = b"".join(self._shown(self._call.answer.result()))
            await self._begin(send, None if self._stream else len(body))
        elif isinstance(error, Exception):
            status, shown = self._error(error)
            body = error_event(shown) if self._begun else msgspec.json.encode(shown)
            await self._begin(send, len(body), status)
        else:
            raise error
        await send({"type": "http.response.body", "body": body, "more_body": True})
        for _ in range(TURNS_OF_THE_LOOP):
            await asyncio.sleep(0)
        if gone.done():
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if error is None:
            self._delivered()

    async def _begin(self, send: Send, num_bytes: int | None = None, status: int = 200) -> None:
        """Send the headers, if they are not sent yet. A stream's come with its first byte, so that an early error has
        its own status.
        """
        if self._begun:
            return
        self._begun = True
        if num_bytes is None:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % num_bytes)]
        await send({"type": "http.response.start", "status": status, "headers": headers})

"""HTTP calls to one SGLang server; its failures become Penstock's errors.

Owns the connection and the server's description.

    transport error -> EngineDiedError (EngineAbsentError: the request never reached a server)
    no answer in time -> TimeoutError      400, 422 -> EngineRejectedError      other statuses -> EngineError
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec

from penstock.config.secrets import shown_url
from penstock.errors import EngineDiedError, EngineError, EngineRejectedError
from penstock.runtime.requests import transport_fault
from penstock_rollout.engine.sglang.answers import read_info
from penstock_rollout.engine.types import EngineAbsentError, EngineInfo

CONTROL_TIMEOUT_SECONDS = 30.0  # pause in mode abort takes more than a second while requests run
JSON = {"Content-Type": "application/json"}
KEEPALIVE_SECONDS = 2.0  # below the 5 s after which the server closes: a request must not meet a closing connection


class Connection:
    """Calls the server that was opened last."""

    def __init__(self) -> None:
        self.control_timeout_seconds = CONTROL_TIMEOUT_SECONDS
        self._http: httpx.AsyncClient | None = None
        self._info: EngineInfo | None = None
        self._calls: set[asyncio.Timeout] = set()

    @property
    def info(self) -> EngineInfo:
        """The server's description, as of `open`."""
        if self._info is None:
            raise EngineDiedError("the engine is not connected yet; expected it to be started first")
        return self._info

    @property
    def port(self) -> int | None:
        """The port at which the server listens; None while there is no server."""
        return None if self._http is None else self._http.base_url.port

    async def open(self, url: str) -> EngineInfo:
        """Call the server at `url` from now on."""
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=self.control_timeout_seconds,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_SECONDS),
            trust_env=False,
            verify=url.startswith("https"),  # loading certificates takes longer than all the calls
        )
        server, model, models = [await self.call("GET", path) for path in ("/server_info", "/model_info", "/v1/models")]
        self._info = read_info(server, model, models)
        return self._info

    @contextlib.asynccontextmanager
    async def closing(self) -> AsyncIterator[None]:
        """Refuse new calls from now on; at the end of the block, fail the calls that still wait for an answer."""
        http, self._http = self._http, None
        self._info = None
        calls, self._calls = self._calls, set()
        try:
            yield
        finally:
            if http is not None:
                await http.aclose()
            for running in calls:  # httpx knows nothing of those that are still connecting
                running.reschedule(asyncio.get_running_loop().time())

    async def call(self, method: str, path: str, body: Any = None, timeout_seconds: float | None = None) -> Any:
        """Send a request; returns the answer, as JSON or text. Errors: see above."""
        response = await self._send(method, path, body, timeout_seconds)
        return response.json() if "json" in response.headers.get("content-type", "") else response.text

    async def content(self, method: str, path: str, body: Any, timeout_seconds: float) -> bytes:
        """Send a request; returns the bytes of the answer, for one who knows its types. Errors: see above."""
        return (await self._send(method, path, body, timeout_seconds)).content

    async def _send(self, method: str, path: str, body: Any, timeout_seconds: float | None) -> httpx.Response:
        if timeout_seconds is None:
            timeout_seconds = self.control_timeout_seconds
        if self._http is None:
            raise EngineAbsentError(f"SGLang is not running; expected it to answer {path}")
        url = shown_url(str(self._http.base_url))
        # Not httpx's own JSON, which takes ten times as long for the ids of a long prompt.
        content, headers = (None, None) if body is None else (msgspec.json.encode(body), JSON)
        calls, until_closed = self._calls, asyncio.timeout(None)
        try:
            async with until_closed:
                calls.add(until_closed)
                response = await self._http.request(
                    method, path, content=content, headers=headers, timeout=timeout_seconds
                )
        except TimeoutError:
            raise EngineDiedError(f"the connection to SGLang was closed during {path}") from None
        except httpx.ConnectError as error:
            raise EngineAbsentError(f"nothing listens at {url} for {path}: {transport_fault(error)}") from None
        except httpx.TimeoutException:
            raise TimeoutError(f"SGLang at {url} did not answer {path} in {timeout_seconds:g} s") from None
        except (httpx.TransportError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise EngineDiedError(f"the connection to SGLang broke during {path}: {transport_fault(error)}") from None
        finally:
            calls.discard(until_closed)
        if response.status_code in (400, 422):
            raise EngineRejectedError(f"SGLang refused {path}: {response.text[:500]}")
        if response.status_code != 200:
            raise EngineError(f"SGLang answered {path} with {response.status_code}: {response.text[:500]}")
        return response

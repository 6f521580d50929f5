"""Pushes a staged version to every live rollout server at once.

Owns the trainer's side of `PUT /v1/weights/{version}`. Invariant: when `push` returns, each server either said that it
serves exactly this version or is fenced: it takes no ticket until it has loaded the announced one by itself. Called by
the loop.
"""

import asyncio
import logging
from dataclasses import dataclass

import httpx
import msgspec

from penstock.broker import Announcement, Queue, ServiceRecord
from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock.errors import WeightsError
from penstock.http import auth_headers
from penstock.transfer import Source
from penstock_trainer.transport import Transport

log = logging.getLogger(__name__)

BUSY_RETRY_SECONDS = 0.2
ENGINE_STARTING = "starting"  # the state of a rollout service without an engine; it catches up by itself


@dataclass(frozen=True)
class Push:
    """What came of a push: names of the servers that serve it, and reasons of those that do not."""

    live: tuple[str, ...]
    fenced: dict[str, str]
    seconds: float


class Publisher:
    """The trainer's HTTP client towards rollout servers."""

    def __init__(self, queue: Queue, transport: Transport, config: Config) -> None:
        self._queue = queue
        self._transport = transport
        self._timeout_seconds = config.weights.push_timeout_seconds
        self._client = httpx.AsyncClient(
            headers=auth_headers(config.token),
            timeout=httpx.Timeout(self._timeout_seconds, connect=5.0),
            trust_env=False,  # servers of this run are not behind a proxy
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def push(self, announcement: Announcement) -> Push:
        """Push to all servers whose engine runs; none is no error: a server loads what is announced when it joins."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        services = await self._queue.services()
        servers = [each for each in services if each.kind == "rollout" and each.state != ENGINE_STARTING]
        reasons = await asyncio.gather(*(self._push_one(server, announcement) for server in servers))
        fenced = {server.name: reason for server, reason in zip(servers, reasons, strict=True) if reason}
        for name, reason in fenced.items():
            log.error("rollout server %s is fenced: %s", name, reason, extra={"version": announcement.identity.number})
        live = tuple(server.name for server in servers if server.name not in fenced)
        return Push(live, fenced, loop.time() - start)

    async def _push_one(self, server: ServiceRecord, announcement: Announcement) -> str:
        """The empty string, or why this server does not serve the version."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._deliver(server, announcement)
        except WeightsError as error:
            return str(error)
        except TimeoutError:
            return f"no answer within {self._timeout_seconds:.0f} s (weights.push_timeout_seconds)"
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    async def _deliver(self, server: ServiceRecord, announcement: Announcement) -> None:
        """Return when the server serves the version; WeightsError with its reason when it does not."""
        async with self._transport.delivery(server, announcement) as source:
            if reason := await self._put(server.url, announcement, source):
                raise WeightsError(reason)

    async def _put(self, url: str, announcement: Announcement, source: Source) -> str:
        identity = announcement.identity
        body = {
            "digest": identity.digest,
            "path": announcement.path,
            "lease": announcement.lease,
            "source": msgspec.to_builtins(source),
        }
        while True:
            response = await self._client.put(f"{url}/v1/weights/{identity.number}", json=body)
            if response.status_code == 503:
                await asyncio.sleep(BUSY_RETRY_SECONDS)
                continue
            if response.status_code != 200:
                return f"HTTP {response.status_code}: {response.text[:300]}"
            return _wrong_identity(response, identity)


def _wrong_identity(response: httpx.Response, expected: PolicyIdentity) -> str:
    """The empty string, or what the server says that it serves instead."""
    try:
        served = response.json()
    except ValueError:
        served = None
    if not isinstance(served, dict):
        return f"its answer is {response.text[:300]!r}; expected policy_version and checksum"
    number, digest = served.get("policy_version"), served.get("checksum")
    if (number, digest) != (expected.number, expected.digest):
        return f"it serves {number}-{digest}, not {expected.number}-{expected.digest}"
    return ""

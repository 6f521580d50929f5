"""The trainer's HTTP client of rollout services. Owns the requests and the meaning of their answers.

Invariant: each service has a client of its own, which keeps its connection from push to push. The pool of one client
for all holds 100 connections and looks through them for each request: what a push costs would grow with the square of
the number of servers.
"""

import asyncio
from collections.abc import Collection

import httpx

from penstock.config import Config
from penstock.contracts import MalformedMessageError, from_body, to_body
from penstock.contracts.services import Announcement, Doubt, ServedWeights, Turn, push_body
from penstock.contracts.weight_sources import GroupRequest, Source
from penstock.errors import WeightsError
from penstock.runtime.requests import auth_headers

BUSY_RETRY_SECONDS = 0.2
# To connect: a host that is gone must not hold a push up for long. All servers are connected to at once, and a busy
# event loop needs a while for each; those that come last are not to blame.
CONNECT_SECONDS, CONNECT_SECONDS_EACH = 5.0, 0.02


class RolloutClient:
    """Requests to rollout services. Each fails with WeightsError, httpx.HTTPError or TimeoutError."""

    def __init__(self, config: Config) -> None:
        self._headers = auth_headers(config.token)
        self._seconds = config.weights.push_timeout_seconds
        self._num_services = 0
        self._trusted = httpx.create_ssl_context(trust_env=False)  # reading the certificates takes 20 ms
        self._clients: dict[str, httpx.AsyncClient] = {}

    def _client(self, url: str) -> httpx.AsyncClient:
        """The client of the service at `url`."""
        if url not in self._clients:
            self._clients[url] = httpx.AsyncClient(
                headers=self._headers,
                verify=self._trusted,
                trust_env=False,  # servers of this run are not behind a proxy
            )
        return self._clients[url]

    async def _request(self, method: str, url: str, path: str, body: object = None) -> httpx.Response:
        """A request to the service at `url`, which may have closed its connection since the last one."""
        connect_seconds = CONNECT_SECONDS + CONNECT_SECONDS_EACH * self._num_services
        timeout = httpx.Timeout(self._seconds, connect=connect_seconds)
        return await self._client(url).request(method, f"{url}{path}", json=body, timeout=timeout)

    async def close(self) -> None:
        await self.close_others(())

    async def close_others(self, urls: Collection[str]) -> None:
        """Close the connections to all services but these: the others are gone."""
        self._num_services = len(urls)
        gone = [self._clients.pop(url) for url in self._clients.keys() - set(urls)]
        await asyncio.gather(*(client.aclose() for client in gone))

    async def put_weights(self, url: str, announcement: Announcement, source: Source) -> ServedWeights:
        """Let the service load a version; returns what it serves: this version."""
        identity, body = announcement.identity, push_body(announcement, source)
        while True:
            response = await self._request("PUT", url, f"/v1/weights/{identity.number}", body)
            if response.status_code != 503:
                break
            await asyncio.sleep(BUSY_RETRY_SECONDS)
        if response.status_code != 200:
            raise WeightsError(f"HTTP {response.status_code}: {response.text[:300]}")
        served = _served(response)
        if served.identity != identity:
            raise WeightsError(
                f"it serves {served.policy_version}-{served.checksum}, not {identity.number}-{identity.digest}"
            )
        return served

    async def doubt(self, url: str, doubt: Doubt) -> None:
        """Let the service load its weights anew before it takes a ticket."""
        response = await self._request("POST", url, "/v1/weights/doubt", to_body(doubt))
        if response.status_code != 200:
            raise WeightsError(f"HTTP {response.status_code}: {response.text[:300]}")

    async def sleep(self, url: str, turn: Turn) -> bool:
        """Let the service's engine give up its GPU memory for a turn of the trainer; False: not yet, ask again."""
        response = await self._request("POST", url, "/v1/sleep", to_body(turn))
        if response.status_code not in (200, 503):
            raise WeightsError(f"HTTP {response.status_code}: {response.text[:300]}")
        return response.status_code == 200

    async def served(self, url: str) -> ServedWeights:
        """The version that the service serves, and its engine."""
        return _served(await self._request("GET", url, "/v1/weight_version"))

    async def join_group(self, url: str, request: GroupRequest) -> None:
        """Let the service's engine join a group; returns when it has joined."""
        response = await self._request("POST", url, "/v1/weights/group", to_body(request))
        if response.status_code != 200:
            raise WeightsError(f"it did not join a group: HTTP {response.status_code}: {response.text[:300]}")


def _served(response: httpx.Response) -> ServedWeights:
    try:
        return from_body(response.content, ServedWeights)
    except MalformedMessageError as error:
        raise WeightsError(
            f"its answer is {response.text[:300]!r}; expected {', '.join(ServedWeights.__struct_fields__)}: {error}"
        ) from error

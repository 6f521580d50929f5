"""The trainer's HTTP client towards rollout services. Owns the requests and what their answers mean."""

import asyncio
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement
from penstock.contracts.weight_sources import GroupRequest, Source
from penstock.errors import WeightsError
from penstock.runtime.http import auth_headers

BUSY_RETRY_SECONDS = 0.2


@dataclass(frozen=True)
class EngineRecord:
    """What a service says of its engine: how often it was started, where it runs, how many processes it has, and what
    it serves."""

    starts: int
    device: str
    num_ranks: int
    serves: PolicyIdentity | None


class RolloutClient:
    """Requests to rollout services. Each fails with WeightsError, httpx.HTTPError or TimeoutError."""

    def __init__(self, config: Config) -> None:
        self._client = httpx.AsyncClient(
            headers=auth_headers(config.token),
            timeout=httpx.Timeout(config.weights.push_timeout_seconds, connect=5.0),
            trust_env=False,  # servers of this run are not behind a proxy
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def put_weights(self, url: str, announcement: Announcement, source: Source) -> float:
        """Have a version loaded; returns how many seconds generation was paused for it."""
        identity = announcement.identity
        body = {
            "digest": identity.digest,
            "path": announcement.path,
            "lease": announcement.lease,
            "source": msgspec.to_builtins(source),
            "canary": msgspec.to_builtins(announcement.canary),
        }
        while True:
            response = await self._client.put(f"{url}/v1/weights/{identity.number}", json=body)
            if response.status_code != 503:
                break
            await asyncio.sleep(BUSY_RETRY_SECONDS)
        if response.status_code != 200:
            raise WeightsError(f"HTTP {response.status_code}: {response.text[:300]}")
        served = _mapping(response)
        _check_identity(served, response, identity)
        return float(served.get("paused_seconds") or 0.0)

    async def engine(self, url: str) -> EngineRecord:
        """What the service's engine is."""
        response = await self._client.get(f"{url}/v1/weight_version")
        served = _mapping(response)
        try:
            number = served["policy_version"]
            serves = None if number is None else PolicyIdentity(int(number), str(served["checksum"]))
            return EngineRecord(
                int(served["engine_starts"]), str(served["engine_device"]), int(served["engine_num_ranks"]), serves
            )
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"its answer is {response.text[:300]!r}; expected policy_version, engine_starts, "
                "engine_device and engine_num_ranks"
            ) from error

    async def join_group(self, url: str, request: GroupRequest) -> None:
        """Let the service's engine join a group; returns when it has."""
        response = await self._client.post(f"{url}/v1/weights/group", json=msgspec.to_builtins(request))
        if response.status_code != 200:
            raise WeightsError(f"it did not join a group: HTTP {response.status_code}: {response.text[:300]}")


def _mapping(response: httpx.Response) -> dict[str, Any]:
    try:
        served = response.json()
    except ValueError:
        served = None
    return served if isinstance(served, dict) else {}


def _check_identity(served: dict[str, Any], response: httpx.Response, expected: PolicyIdentity) -> None:
    if not served:
        raise WeightsError(f"its answer is {response.text[:300]!r}; expected policy_version and checksum")
    number, digest = served.get("policy_version"), served.get("checksum")
    if (number, digest) != (expected.number, expected.digest):
        raise WeightsError(f"it serves {number}-{digest}, not {expected.number}-{expected.digest}")

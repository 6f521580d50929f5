"""Files of the announced weights, for a server that is behind: those that are there, or those that the trainer writes.

Transports that send weights leave no files, and a chain of deltas may be damaged, so that a server that joins, or
missed a push, asks for some.
"""

import asyncio
from pathlib import Path
from typing import Protocol

import httpx
from pydantic import SecretStr

from penstock.contracts import PolicyIdentity, ServiceKind
from penstock.contracts.canary import read_canary
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.errors import WeightsError
from penstock.runtime.http import auth_headers
from penstock.weights.manifest import MANIFEST_NAME

CONNECT_SECONDS = 5.0


class Registry(Protocol):
    """What is needed of the queue."""

    async def services(self) -> list[ServiceRecord]: ...


class Snapshots:
    """Asks the trainer."""

    def __init__(self, registry: Registry, token: SecretStr | None, timeout_seconds: float) -> None:
        self._registry = registry
        self._token = token
        self._timeout_seconds = timeout_seconds

    async def files_of(self, announced: Announcement, needs_whole: bool = False) -> Announcement:
        """The announced version where its files exist, else the trainer's newest; WeightsError when there is none.

        `needs_whole`: the files that exist cannot be used, as they are deltas.
        """
        manifest = Path(announced.path) / MANIFEST_NAME
        if not needs_whole and await asyncio.to_thread(manifest.exists):
            return announced
        trainers = [each for each in await self._registry.services() if each.kind is ServiceKind.TRAINER]
        if not trainers:
            raise WeightsError(f"{manifest} does not exist, and no trainer runs that could write it")
        trainer = trainers[-1]
        timeout = httpx.Timeout(self._timeout_seconds, connect=CONNECT_SECONDS)
        try:
            async with httpx.AsyncClient(
                timeout=timeout, trust_env=False, verify=trainer.url.startswith("https")
            ) as client:
                response = await client.post(f"{trainer.url}/v1/snapshot", headers=auth_headers(self._token))
        except httpx.HTTPError as error:
            raise WeightsError(f"{trainer.name} at {trainer.url} wrote no snapshot: {error!r}") from error
        if response.status_code != 200:
            raise WeightsError(f"{trainer.name} wrote no snapshot: HTTP {response.status_code}: {response.text[:300]}")
        return _announcement(response)


def _announcement(response: httpx.Response) -> Announcement:
    try:
        body = response.json()
        identity = PolicyIdentity(int(body["policy_version"]), str(body["checksum"]))
        return Announcement(identity, str(body["path"]), int(body["lease"]), read_canary(body["canary"]))
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"the trainer's answer is {response.text[:300]!r} ({error!r}); expected policy_version, checksum, path, "
            "lease and canary"
        ) from error

"""Files of the announced weights, for a server that is behind: existing ones, or new ones from the trainer.

Transports that send weights leave no files, and a chain of deltas may be damaged. So a server that joins, or missed a
push, requests files.
"""

import asyncio
from pathlib import Path
from typing import Protocol

import httpx
from pydantic import SecretStr

from penstock.contracts import MalformedMessageError, ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord, read_snapshot
from penstock.errors import WeightsError
from penstock.runtime.requests import auth_headers, transport_fault
from penstock.weights.manifest import MANIFEST_NAME

CONNECT_SECONDS = 5.0


class Registry(Protocol):
    """The part of the queue that `Snapshots` uses."""

    async def services(self) -> list[ServiceRecord]: ...


class Snapshots:
    """Requests files from the trainer."""

    def __init__(self, registry: Registry, token: SecretStr | None, timeout_seconds: float) -> None:
        self._registry = registry
        self._token = token
        self._timeout_seconds = timeout_seconds

    async def files_of(self, announced: Announcement, needs_full: bool = False) -> Announcement:
        """The announced version if its files exist, else the trainer's newest; WeightsError if there is none.

        `needs_full`: the files at the announced path cannot be used, because they are deltas.
        """
        manifest = Path(announced.path) / MANIFEST_NAME
        if not needs_full and await asyncio.to_thread(manifest.exists):
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
            raise WeightsError(
                f"{trainer.name} at {trainer.url} wrote no snapshot: {transport_fault(error)}"
            ) from error
        if response.status_code != 200:
            raise WeightsError(f"{trainer.name} wrote no snapshot: HTTP {response.status_code}: {response.text[:300]}")
        return _announcement(response)


async def as_relayed(announced: Announcement, needs_full: bool = False) -> Announcement:
    """The announced version itself: with a relay, files come from whoever serves it, and no path is shared."""
    return announced


def _announcement(response: httpx.Response) -> Announcement:
    try:
        return read_snapshot(response.content)
    except MalformedMessageError as error:
        raise WeightsError(
            f"the trainer's answer is {response.text[:300]!r} ({error}); expected policy_version, checksum, path, "
            "lease and canary"
        ) from error

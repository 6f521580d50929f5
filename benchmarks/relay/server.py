"""One server of `benchmarks.relay`, as a process: it receives versions, verifies them and passes them on, by a link of
limited speed. It has no engine.

Owns the link and the faults. The receiving and the sending side are those of the rollout service.
"""

import asyncio
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from penstock.contracts import ServerState, to_body
from penstock.contracts.services import ServedWeights, read_push
from penstock.contracts.weight_sources import RelayRequest, RelaySource
from penstock.runtime.http import make_app
from penstock.runtime.relay_route import add_relay
from penstock.runtime.service import Service
from penstock.weights.chunks import LEAST_CHUNK_BYTES
from penstock.weights.local_folder import LocalFolder
from penstock.weights.manifest import read_manifest, verify
from penstock.weights.relay import HeldVersion, Relay
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.relayed import RelayedVersions

Fault = Literal["", "slow", "corrupting"]
SECONDS = 600.0
SLOWER = 20.0


class Link:
    """Sends bytes at a limited speed, whichever stream they belong to."""

    def __init__(self, bytes_per_second: float) -> None:
        """0: without a limit."""
        self._rate = bytes_per_second
        self._free_at = 0.0

    async def carry(self, num_bytes: int) -> None:
        """Return when the link has carried them."""
        if self._rate:
            loop = asyncio.get_running_loop()
            self._free_at = max(self._free_at, loop.time()) + num_bytes / self._rate
            await asyncio.sleep(self._free_at - loop.time())


class LinkedRelay(Relay):
    """A relay whose bytes go over one link."""

    def __init__(self, link: Link, fault: Fault = "") -> None:
        super().__init__()
        self._link = link
        self._fault = fault

    async def stream(self, version: HeldVersion, request: RelayRequest) -> AsyncIterator[bytes]:
        async for piece in super().stream(version, request):
            await self._link.carry(len(piece))
            lies = self._fault == "corrupting" and len(piece) >= LEAST_CHUNK_BYTES  # not of the list or the manifest
            yield bytes([piece[0] ^ 1]) + piece[1:] if lies else piece


def serve(name: str, root: str, bytes_per_second: float, fault: Fault, pipe: Connection) -> None:
    """Serve until the other end of `pipe` closes; sends the URL first."""
    asyncio.run(_serve(name, root, bytes_per_second / (SLOWER if fault == "slow" else 1), fault, pipe))


async def _serve(name: str, root: str, bytes_per_second: float, fault: Fault, pipe: Connection) -> None:
    async def no_services() -> list[Any]:
        return []

    versions = RelayedVersions(lambda size: LocalFolder(name, size, root), no_services, None, RolloutMetrics(), name)
    versions.relay = LinkedRelay(Link(bytes_per_second), fault)
    app = make_app(
        name, not_ready=lambda: None, metrics=CollectorRegistry(), body_bytes={"/v1/weights/{version}": 2**22}
    )
    add_relay(app, versions.relay)
    served = ServedWeights(None, None, 0.0, ServerState.SERVING, "", 1, "cpu", 1)

    @app.put("/v1/weights/{version}")
    async def put(version: int, push: dict[str, Any]) -> dict[str, Any]:
        wanted, source = read_push(version, push)
        assert isinstance(source, RelaySource)
        folder, left = await versions.bring(wanted, source.parents, SECONDS)
        manifest = read_manifest(folder)
        await asyncio.to_thread(verify, Path(folder), manifest)
        versions.loaded(wanted)
        identity = manifest.identity
        return to_body(replace(served, policy_version=identity.number, checksum=identity.digest, left=left))

    @app.post("/v1/weights/doubt")
    async def doubt(request: dict[str, Any]) -> dict[str, Any]:
        await versions.forget()
        return to_body(served)

    service = Service("127.0.0.1", 0, "port")
    pipe.send(service.url)

    async def until_closed() -> None:
        await asyncio.to_thread(pipe.poll, None)

    await service.run(app, until=until_closed())
    versions.close()

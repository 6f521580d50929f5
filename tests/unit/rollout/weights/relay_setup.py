"""Services that pass versions on over real connections, whole or with a fault, and a server that fetches from them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from penstock.contracts import PolicyIdentity, ServerState, ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import Parent, RelayRequest
from penstock.runtime.http import make_app
from penstock.runtime.relay_route import add_relay
from penstock.runtime.service import Service
from penstock.weights.chunks import list_chunks
from penstock.weights.local_folder import LocalFolder
from penstock.weights.relay import HEAD, HeldVersion, Relay
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.relayed import RelayedVersions
from tests.unit.rollout.test_fake_engine import stage_weights

TOKEN = SecretStr("secret")
NUM_CHUNKS = 40
CHUNK_BYTES = 2**16  # the least


class FaultyRelay(Relay):
    """Sends as a healthy one does until chunk `at`; then `fault` gets each piece, and gives what is sent instead."""

    def __init__(self, at: int, fault: Callable[[bytes], AsyncIterator[bytes]]) -> None:
        super().__init__()
        self._at = at
        self._fault = fault

    async def stream(self, version: HeldVersion, request: RelayRequest) -> AsyncIterator[bytes]:
        number = request.start - 1
        async for piece in super().stream(version, request):
            number += len(piece) == HEAD.size
            if number < self._at:
                yield piece
            else:
                async for each in self._fault(piece):
                    yield each


async def dies(piece: bytes) -> AsyncIterator[bytes]:
    """The connection breaks."""
    raise ConnectionAbortedError
    yield piece


async def lies(piece: bytes) -> AsyncIterator[bytes]:
    """A bit of a chunk is another one."""
    yield piece if len(piece) == HEAD.size else bytes([piece[0] ^ 1]) + piece[1:]


async def falls_silent(piece: bytes) -> AsyncIterator[bytes]:
    """It lives, and sends nothing more."""
    await asyncio.Event().wait()
    yield piece


async def crawls(piece: bytes) -> AsyncIterator[bytes]:
    """Bytes come, but few: 20 kB a second, in pieces."""
    for start in range(0, len(piece), 2000):
        await asyncio.sleep(0.1)
        yield piece[start : start + 2000]


@dataclass
class Sender:
    """A service of the run that passes versions on."""

    name: str
    url: str
    relay: Relay

    @property
    def parent(self) -> Parent:
        return Parent(self.name, self.url)


@contextlib.asynccontextmanager
async def sending(name: str, relay: Relay, token: SecretStr | None = TOKEN) -> AsyncIterator[Sender]:
    service = Service("127.0.0.1", 0, "rollout.port")
    app = make_app(name, not_ready=lambda: None, metrics=CollectorRegistry(), token=token)
    add_relay(app, relay)
    running = asyncio.create_task(service.run(app, until=_until(service.stop)))
    try:
        yield Sender(name, service.url, relay)
    finally:
        service.stop.set()
        await running


async def _until(stop: asyncio.Event) -> None:
    await stop.wait()


def staged(root: Path, version: int = 3, *, rate: float = 0.0) -> tuple[Announcement, HeldVersion]:
    """A version of 40 chunks and more, and its files to send. `rate`: with which they came, if they were received."""
    path, digest = stage_weights(root, version)
    # The rest is no tensor: only its chunks are compared.
    (Path(path) / "config.json").write_bytes(bytes(range(256)) * (NUM_CHUNKS * CHUNK_BYTES // 256))
    held = HeldVersion(Path(path), list_chunks(Path(path)), complete=True)
    held.rate = rate
    return Announcement(PolicyIdentity(version, digest), path, 1, chunks=held.digest), held


@dataclass
class Registry:
    records: list[ServiceRecord] = field(default_factory=list)

    async def services(self) -> list[ServiceRecord]:
        return self.records

    def add(self, sender: Sender, identity: PolicyIdentity | None = None) -> None:
        """A server that serves this version, or the trainer."""
        kind = ServiceKind.TRAINER if identity is None else ServiceKind.ROLLOUT
        state = ServerState.SERVING if identity else "training"
        self.records.append(ServiceRecord(kind, sender.name, sender.url, 0, state, identity))


@dataclass
class Receiver:
    """What a rollout service has of relayed versions."""

    versions: RelayedVersions
    metrics: RolloutMetrics
    registry: Registry
    root: Path

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"penstock_rollout_relay_{name}", labels)

    def folders(self) -> list[Path]:
        return sorted(path for path in self.root.glob("*/*") if path.is_dir())


def receiver(root: Path, name: str = "receiver") -> Receiver:
    metrics, registry = RolloutMetrics(), Registry()
    versions = RelayedVersions(
        lambda num_bytes: LocalFolder("copy", num_bytes, str(root / name)), registry.services, TOKEN, metrics, name
    )
    return Receiver(versions, metrics, registry, root / name)

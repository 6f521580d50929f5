"""How the engine gets the bytes of a version: one loader per transport.

Invariant: `prepare` changes nothing that is served; `load` runs while generation is paused, and after it the engine
holds every weight of the version or has to be restarted.
"""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from msgspec.structs import replace

from penstock.contracts.services import Announcement
from penstock.contracts.weight_sources import (
    CollectiveSource,
    DiskSource,
    LeftParent,
    Parent,
    RelaySource,
    Source,
    TensorSource,
)
from penstock.errors import WeightsError
from penstock.weights.local_folder import SHARED_MEMORY
from penstock.weights.manifest import read_manifest, verify
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.interface import WeightLoading
from penstock_rollout.weights.local_copy import LocalCopy
from penstock_rollout.weights.relayed import RelayedVersions

T = TypeVar("T")


class Loader(Protocol):
    """One version on its way into the engine. `files`: the folder that the engine reads, if it does."""

    transport: str

    @property
    def files(self) -> Path | None: ...

    async def prepare(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        """Before generation pauses: WeightsError if the bytes are not the announced ones."""

    async def load(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        """While it is paused: replace all weights."""


class DiskLoader:
    """From files in a folder that trainer and servers share, or from a local copy to which their deltas are applied."""

    transport = "disk"

    def __init__(self, copy: LocalCopy | None = None) -> None:
        self.files: Path | None = None
        self._copy = copy

    async def prepare(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        folder = Path(wanted.path)
        manifest = await asyncio.to_thread(read_manifest, folder)
        if manifest.identity != wanted.identity:
            raise WeightsError(
                f"{folder} holds {manifest.version}-{manifest.digest}; expected "
                f"{wanted.identity.number}-{wanted.identity.digest}; weights.folder must be shared with the trainer"
            )
        if self._copy is None:
            self.files = folder
            reading = asyncio.create_task(loading.prefetch(folder, timeout_seconds))
            try:
                await asyncio.to_thread(verify, folder, manifest)
                await reading
            finally:
                reading.cancel()  # if the bytes are wrong
        else:
            self.files = await asyncio.to_thread(self._copy.bring, folder, manifest)
            await loading.prefetch(self.files, timeout_seconds)

    async def load(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        assert self.files is not None
        await loading.load(self.files, str(wanted.identity), timeout_seconds)


class RelayLoader:
    """From files that other servers or the trainer send, chunk by chunk, and that this server passes on meanwhile."""

    transport = "relay"

    def __init__(self, relayed: RelayedVersions, parents: tuple[Parent, ...] = ()) -> None:
        """`parents`: see `RelayedVersions.bring`."""
        self.left: tuple[LeftParent, ...] = ()
        self._relayed = relayed
        self._parents = parents
        self._disk = DiskLoader()

    @property
    def files(self) -> Path | None:
        return self._disk.files

    async def prepare(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        folder, self.left = await self._relayed.bring(wanted, self._parents, timeout_seconds)
        try:
            await self._disk.prepare(replace(wanted, path=str(folder)), loading, timeout_seconds)
        except WeightsError:
            await self._relayed.forget()  # it was damaged after its chunks had come
            raise

    async def load(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        await self._disk.load(wanted, loading, timeout_seconds)
        self._relayed.loaded(wanted)


class CollectiveLoader:
    """From broadcasts of the trainer in a group that the engine has joined."""

    transport = "nccl"
    files: Path | None = None

    def __init__(self, source: CollectiveSource, engine: Engine) -> None:
        self._source = source
        self._engine = engine

    async def prepare(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        if self._engine.group != self._source.group:
            raise WeightsError(
                f"the engine is in the group {self._engine.group!r}, not in {self._source.group!r}: it was started "
                "anew, or another trainer has taken over; expected POST /v1/weights/group first"
            )

    async def load(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        await loading.begin()
        for tensors, version in _with_version(self._source.buckets, wanted):
            await loading.receive(self._source.group, tensors, version, timeout_seconds)
        await loading.end(timeout_seconds)


class TensorLoader:
    """From memory that the trainer shares with the engine, on one host."""

    transport = "tensor"
    files: Path | None = None

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    async def prepare(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        for bucket in self._source.buckets:
            path = SHARED_MEMORY / bucket.handle.lstrip("/")
            if not path.exists():
                raise WeightsError(
                    f"the trainer's shared memory {path} is not on this host: weights.transport tensor needs trainer "
                    "and servers on one; expected disk or nccl"
                )

    async def load(self, wanted: Announcement, loading: WeightLoading, timeout_seconds: float) -> None:
        await loading.begin()
        for bucket, version in _with_version(self._source.buckets, wanted):
            await loading.load_shared(self._source.manager, bucket, version, timeout_seconds)
        await loading.end(timeout_seconds)


def make_loader(
    source: Source, engine: Engine, copy: LocalCopy | None = None, relayed: RelayedVersions | None = None
) -> Loader:
    """The loader of a pushed source. `copy`: of a service that applies deltas; `relayed`: of one that relays."""
    match source:
        case DiskSource():
            return DiskLoader(copy)
        case CollectiveSource():
            return CollectiveLoader(source, engine)
        case TensorSource():
            return TensorLoader(source)
        case RelaySource():
            if relayed is None:
                raise WeightsError(
                    "the trainer relays versions, and this service was started with weights.relay_fan_out 0: expected "
                    "the trainer's value"
                )
            return RelayLoader(relayed, source.parents)


def _with_version(buckets: Sequence[T], wanted: Announcement) -> Iterator[tuple[T, str | None]]:
    """Each bucket; the last one with the version that is served after it."""
    for number, bucket in enumerate(buckets, start=1):
        yield bucket, str(wanted.identity) if number == len(buckets) else None

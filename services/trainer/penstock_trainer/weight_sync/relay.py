"""Weights as files that servers pass on: the trainer sends them to a few servers, each of these to a few others."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path

from msgspec.structs import replace

from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import RelaySource
from penstock.weights.chunks import list_chunks
from penstock.weights.manifest import KEPT_VERSIONS
from penstock.weights.relay import HeldVersion, Relay
from penstock_trainer.weight_sync.relay_tree import RelayTree
from penstock_trainer.weight_sync.transport import Transport


class RelayTransport:
    """`Transport` over staged folders, whose files it sends itself, by the route of `relay`."""

    def __init__(self, files: Transport, relay: Relay, tree: RelayTree) -> None:
        """`files`: stages the folders."""
        self.relay = relay
        self.chunks = ""
        self._files = files
        self._tree = tree

    def stage(self, version: int, lease: int) -> PolicyIdentity:
        # Before the folder of the oldest one is removed, and its file is used again.
        self.relay.drop_all_but(set(self.relay.digests[-(KEPT_VERSIONS - 1) :]))
        identity = self._files.stage(version, lease)
        folder = self.folder_of(version, lease)
        held = HeldVersion(folder, list_chunks(folder), complete=True)
        self.relay.hold(held)
        self.chunks = held.digest
        return identity

    def snapshot(self) -> Announcement:
        return replace(self._files.snapshot(), chunks=self.chunks)

    def digest(self, version: int) -> PolicyIdentity:
        return self._files.digest(version)

    def folder_of(self, version: int, lease: int) -> Path:
        return self._files.folder_of(version, lease)

    @asynccontextmanager
    async def delivery(self, server: ServiceRecord, announcement: Announcement) -> AsyncIterator[RelaySource]:
        yield RelaySource(self._tree.parents_of(server))

    def prune(self, kept: Collection[int]) -> None:
        self._files.prune(kept)

    def close(self) -> None:
        self.relay.drop_all_but(set())
        self._files.close()

"""Weights as files in a folder that trainer and servers share. Servers read them by themselves, also if they are
behind."""

import contextlib
from collections.abc import AsyncIterator, Collection
from pathlib import Path

from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import DiskSource
from penstock.errors import WeightsBusyError
from penstock_trainer.weights.staging import Staging


class DiskTransport:
    """`Transport` over staged folders."""

    chunks = ""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._staged: Announcement | None = None

    def stage(self, version: int, lease: int) -> PolicyIdentity:
        identity = self._staging.write(version, lease)
        self._staged = Announcement(identity, str(self.folder_of(version, lease)), lease)
        return identity

    def snapshot(self) -> Announcement:
        if self._staged is None:
            raise WeightsBusyError("no weights are staged yet; try again")
        self._staging.complete()
        return self._staged

    def digest(self, version: int) -> PolicyIdentity:
        return self._staging.digest(version)

    def folder_of(self, version: int, lease: int) -> Path:
        return self._staging.folder_of(version, lease)

    @contextlib.asynccontextmanager
    async def delivery(self, server: ServiceRecord, announcement: Announcement) -> AsyncIterator[DiskSource]:
        yield DiskSource()  # the trainer sends nothing: the announcement names the folder

    def prune(self, kept: Collection[int]) -> None:
        self._staging.prune(kept)

    def close(self) -> None:
        self._staging.close()

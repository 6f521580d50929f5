"""The interface of a weight transport.

A version is staged once: its bytes are fixed and have a digest, and the learner may go on. Then it is delivered to all
servers at the same time: each server gets the source of the bytes, and reads them, or receives them while the trainer
sends.
"""

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import Source


class Transport(Protocol):
    """A weight transport: disk, relay, broadcast or shared memory."""

    @property
    def chunks(self) -> str:
        """The digest of the newest staged version's list of chunks; empty if servers do not relay it."""

    def stage(self, version: int, lease: int) -> PolicyIdentity:
        """Fix the current weights as `version`. In a thread; never while a version is being delivered."""

    def digest(self, version: int) -> PolicyIdentity:
        """The identity that staging the current weights as `version` would give; keeps nothing."""

    def folder_of(self, version: int, lease: int) -> Path:
        """The folder of a version as files, whether they exist or not."""

    def delivery(self, server: ServiceRecord, announcement: Announcement) -> AbstractAsyncContextManager[Source]:
        """Around one server's update, with the source for it.

        All sending happens within: after it nothing more reaches that server's engine. After an error the engine may
        hold a part of the version, and is not trusted.
        """

    def snapshot(self) -> Announcement:
        """The newest staged version as files, for a server that is behind. In a thread."""

    def prune(self, kept: Collection[int]) -> None:
        """Remove what earlier lives of the trainer left, except these versions. In a thread."""

    def close(self) -> None:
        """Remove everything: a later trainer stages its weights again before it announces them."""

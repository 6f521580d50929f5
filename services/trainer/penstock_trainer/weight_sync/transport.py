"""What every way of getting weights to the servers has in common.

A version is staged once: its bytes are fixed and have a digest, and the learner may go on. Then it is delivered to each
server at the same time: the server is told where the bytes are, and those that are sent rather than read are sent
meanwhile.
"""

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import Source


class Transport(Protocol):
    """One way of getting weights to servers."""

    def stage(self, version: int, lease: int) -> PolicyIdentity:
        """Fix the present weights as `version`. In a thread; nothing is being delivered meanwhile."""

    def digest(self, version: int) -> PolicyIdentity:
        """The identity that staging the present weights as `version` would give; keeps nothing."""

    def folder_of(self, version: int, lease: int) -> Path:
        """Where a version is, or would be, as files."""

    def delivery(self, server: ServiceRecord, announcement: Announcement) -> AbstractAsyncContextManager[Source]:
        """Around one server's update, which is told the source. What is sent, is sent within: after it nothing more
        reaches that server's engine. Left with an error, the engine may hold a part, and is not trusted."""

    def snapshot(self) -> Announcement:
        """The newest staged version as files, for a server that is behind. In a thread."""

    def prune(self, kept: Collection[int]) -> None:
        """Remove what earlier lives of the trainer left, except these versions."""

    def close(self) -> None:
        """Remove everything: a later trainer stages its weights again before it announces them."""

"""The common part of transports that send from the trainer's memory: staging into a copy, and files on demand.

Invariant: the copy of a version does not change while it is delivered; files are written from the copy, without the
learner or its other ranks.
"""

import threading
from collections.abc import Collection
from pathlib import Path

from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement
from penstock.errors import WeightsBusyError
from penstock.weights.manifest import identity_digest
from penstock_trainer.weights.buckets import Allocate, WeightCopy
from penstock_trainer.weights.files import Format, digests
from penstock_trainer.weights.staging import Staging, WeightsSource


class CopiedVersions:
    """The newest staged version as a copy, and the requested versions as files."""

    chunks = ""

    def __init__(
        self, source: WeightsSource, folder: Path, form: Format, *, bucket_bytes: int, allocate: Allocate, keep: int
    ) -> None:
        self._source = source
        self._form = form
        self.copy = WeightCopy(source, form, bucket_bytes, allocate)
        self._files = Staging(self.copy, folder, form, keep=keep)
        self._staged: Announcement | None = None
        self._failed = False
        self._lock = threading.Lock()  # a snapshot must not overlap with staging the next version

    def stage(self, version: int, lease: int) -> PolicyIdentity:
        with self._lock:
            if self._failed:
                self.forget_memory()
                self.copy.renew()
            self._failed, self._staged = False, None
            identity = PolicyIdentity(version, self.copy.fill())
            self._staged = Announcement(identity, str(self._files.folder_of(version, lease)), lease)
            return identity

    def give_up_memory(self) -> None:
        """Use new memory for the next version: a late engine may still read the present copy."""
        self._failed = True

    def forget_memory(self) -> None:
        """Hook before the copy gets new memory, for a transport that must free the old memory itself."""

    def digest(self, version: int) -> PolicyIdentity:
        return PolicyIdentity(version, identity_digest(digests(self._source.weights(), self._form)))

    def folder_of(self, version: int, lease: int) -> Path:
        return self._files.folder_of(version, lease)

    def snapshot(self) -> Announcement:
        """The newest version as files, written if they do not exist."""
        with self._lock:
            if self._staged is None:
                raise WeightsBusyError("no weights are staged yet; try again")
            if not Path(self._staged.path).exists():
                self._files.write(self._staged.identity.number, self._staged.lease)
            return self._staged

    def prune(self, kept: Collection[int]) -> None:
        self._files.prune(kept)

    def close(self) -> None:
        self._files.close()

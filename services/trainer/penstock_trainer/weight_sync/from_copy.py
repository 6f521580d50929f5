"""What transports share whose bytes lie in the trainer's memory: staging into the copy, and files on demand.

Invariant: while a version is being delivered its copy does not change; files are written from the copy, so that neither
the learner nor its other ranks are asked.
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
    """The newest staged version, as a copy, and those that were asked for as files."""

    def __init__(
        self, source: WeightsSource, folder: Path, form: Format, *, bucket_bytes: int, allocate: Allocate, keep: int
    ) -> None:
        self._source = source
        self._form = form
        self.copy = WeightCopy(source, form, bucket_bytes, allocate)
        self._files = Staging(self.copy, folder, form, keep=keep)
        self._staged: Announcement | None = None
        self._failed = False
        self._lock = threading.Lock()  # a snapshot and the next version must not meet

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
        """Somebody may still read the copy when the next version is staged: it gets other memory."""
        self._failed = True

    def forget_memory(self) -> None:
        """Before the copy gets other memory; for whoever has to free the old one."""

    def digest(self, version: int) -> PolicyIdentity:
        return PolicyIdentity(version, identity_digest(digests(self._source.weights(), self._form)))

    def folder_of(self, version: int, lease: int) -> Path:
        return self._files.folder_of(version, lease)

    def snapshot(self) -> Announcement:
        """The newest version as files, written unless they are there."""
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

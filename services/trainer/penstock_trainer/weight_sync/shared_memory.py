"""Weights in shared memory of one host: engines copy them from there.

Owns the shared memory, through torch's own process that counts its users and frees it when the trainer dies. Invariant:
a late engine reads the full version of its request: after a failure the next version is copied into new memory.
"""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from torch import Tensor

from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import SharedBucket, TensorSource
from penstock.errors import WeightsError
from penstock.weights.local_folder import SHARED_MEMORY
from penstock_trainer.weight_sync.from_copy import CopiedVersions
from penstock_trainer.weights.files import Format
from penstock_trainer.weights.staging import WeightsSource


class SharedMemoryTransport(CopiedVersions):
    """`Transport` over shared memory."""

    def __init__(self, source: WeightsSource, folder: Path, form: Format, *, bucket_bytes: int, keep: int) -> None:
        super().__init__(source, folder, form, bucket_bytes=bucket_bytes, allocate=shared_memory, keep=keep)

    @contextlib.asynccontextmanager
    async def delivery(self, server: ServiceRecord, announcement: Announcement) -> AsyncIterator[TensorSource]:
        try:
            yield self._source_of_copy()
        except BaseException:
            self.give_up_memory()
            raise

    def forget_memory(self) -> None:
        """Unlink the memory, so that it is freed when its last user ends: a dead engine may have left a wrong count."""
        for bucket in self.copy.buckets:
            _, handle, _ = bucket.data.untyped_storage()._share_filename_cpu_()
            (SHARED_MEMORY / handle.decode().lstrip("/")).unlink(missing_ok=True)

    def _source_of_copy(self) -> TensorSource:
        manager = ""
        buckets = []
        for bucket in self.copy.buckets:
            manager, handle, num_bytes = shared_name(bucket.data)
            buckets.append(SharedBucket(handle, num_bytes, bucket.specs))
        return TensorSource(manager, tuple(buckets))


def shared_memory(num_bytes: int) -> Tensor:
    """uint8[num_bytes] that other processes of this host can map by name; WeightsError if there is no room."""
    try:
        storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    except RuntimeError as error:
        raise WeightsError(
            f"{num_bytes} bytes of shared memory cannot be had ({error}); expected room for a copy of the weights in "
            "/dev/shm; make it larger, or set weights.transport to disk"
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def shared_name(data: Tensor) -> tuple[str, str, int]:
    """The socket of the process that counts its users, its name, and its size.

    Each use is counted before it begins; the engine undoes the count.
    """
    storage = data.untyped_storage()
    manager, handle, num_bytes = storage._share_filename_cpu_()
    storage._shared_incref()
    return manager.decode(), handle.decode(), num_bytes

"""Weights as broadcasts: rank 0 of a process group with each engine sends buckets, and the engine receives them.

    stage: copy, hash          form: the engine joins a group (once per start of an engine)
    commit: PUT with the layout -> the server pauses, and its engine receives bucket after bucket
            meanwhile a thread broadcasts them ----------------'

The same code runs nccl between GPUs, and gloo if either side has none. Invariants: one group per engine; a group whose
push failed is aborted, and the service of the engine restarts it.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch

from penstock.contracts.services import Announcement, ServedWeights, ServiceRecord
from penstock.contracts.weight_sources import CollectiveSource, GroupRequest
from penstock.errors import WeightsError
from penstock_trainer.weight_sync.from_copy import CopiedVersions
from penstock_trainer.weight_sync.process_group import Backend, Group, MeetingPoint, in_thread
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weights.buckets import Bucket
from penstock_trainer.weights.files import Format
from penstock_trainer.weights.staging import WeightsSource

log = logging.getLogger(__name__)

REASON_SECONDS = 2.0  # in which a server reports why its engine no longer receives
ABORT_SECONDS = 2.0  # in which a thread detects that its group was aborted; after that its memory is replaced too
KEPT_PUSHES = 2  # a server that was not pushed to for longer is gone, and so is its group


@dataclass
class Formed:
    """A group, the number of the engine's start that joined it, and the version that it last sent."""

    group: Group
    name: str
    engine_starts: int
    version: int


class BroadcastTransport(CopiedVersions):
    """`Transport` over process groups."""

    def __init__(
        self,
        source: WeightsSource,
        folder: Path,
        form: Format,
        *,
        bucket_bytes: int,
        keep: int,
        client: RolloutClient,
        point: MeetingPoint,
        device: torch.device,
        seconds: float,
    ) -> None:
        """`point`: where engines meet the trainer; `device`: of the trainer; `seconds`: the longest push."""
        allocate = partial(torch.empty, dtype=torch.uint8, pin_memory=device.type == "cuda")
        super().__init__(source, folder, form, bucket_bytes=bucket_bytes, allocate=allocate, keep=keep)
        self._client = client
        self._point = point
        self._device = device
        self._seconds = seconds
        self._groups: dict[str, Formed] = {}
        self._numbers = count()

    @contextlib.asynccontextmanager
    async def delivery(self, server: ServiceRecord, announcement: Announcement) -> AsyncIterator[CollectiveSource]:
        deadline = time.monotonic() + self._seconds
        self._drop_old(announcement.identity.number)
        served = await self._client.served(server.url)
        if served.identity == announcement.identity:  # from an earlier life of the trainer: it would receive nothing
            yield CollectiveSource("", ())
            return
        formed = await self._group_with(server, served, announcement)
        buckets = self.copy.buckets
        sending = in_thread(partial(_send, formed.group, buckets, deadline))
        try:
            async with _while_sending(sending):
                yield CollectiveSource(formed.name, tuple(bucket.specs for bucket in buckets))
        except BaseException:
            self._groups.pop(server.name, None)
            formed.group.abort()
            await asyncio.wait({sending}, timeout=ABORT_SECONDS)
            if not sending.done():
                self.give_up_memory()
            sending.add_done_callback(_note)
            raise

    async def _group_with(self, server: ServiceRecord, served: ServedWeights, announcement: Announcement) -> Formed:
        """The group with the engine since its last start; forms it if there is none."""
        formed = self._groups.get(server.name)
        if formed is not None and formed.engine_starts == served.engine_starts:
            formed.version = announcement.identity.number
            return formed
        if formed is not None:
            self._groups.pop(server.name).group.abort()
        name = f"penstock-{announcement.lease}-{next(self._numbers)}"
        group = await self._meet(server, served, name, announcement.lease)
        formed = Formed(group, name, served.engine_starts, announcement.identity.number)
        self._groups[server.name] = formed
        return formed

    async def _meet(self, server: ServiceRecord, served: ServedWeights, name: str, lease: int) -> Group:
        backend: Backend = "nccl" if self._device.type == served.engine_device == "cuda" else "gloo"
        num_ranks = 1 + served.engine_num_ranks
        meet = partial(Group.meet, self._point.store, name, num_ranks, backend, self._device, self._seconds)
        meeting = in_thread(meet)
        request = GroupRequest(name, self._point.address, self._point.port, num_ranks, backend, lease)
        try:
            await self._client.join_group(server.url, request)
            group = await meeting
        except RuntimeError as error:
            raise WeightsError(f"its engine and the trainer did not meet in a group: {_first_line(error)}") from error
        finally:
            meeting.cancel()
        log.info("formed a group with the engine of %s", server.name, extra={"group": name, "backend": backend})
        return group

    def _drop_old(self, version: int) -> None:
        for name, formed in list(self._groups.items()):
            if formed.version < version - KEPT_PUSHES:
                self._groups.pop(name).group.abort()


def _send(group: Group, buckets: tuple[Bucket, ...], deadline: float) -> None:
    """Broadcast all buckets; each has the rest of the time."""
    for bucket in buckets:
        group.broadcast(bucket.data, max(0.001, deadline - time.monotonic()))


@contextlib.asynccontextmanager
async def _while_sending(sending: "asyncio.Future[None]") -> AsyncIterator[None]:
    """WeightsError if the broadcast fails; waits REASON_SECONDS for the server to report why."""
    try:
        async with asyncio.timeout(None) as patience:
            watching = asyncio.create_task(_lose_patience(sending, patience))
            try:
                yield
                await asyncio.wait({sending})
            finally:
                watching.cancel()
    except TimeoutError:
        if not patience.expired():  # the push itself is too late
            raise
    if (error := sending.exception()) is not None:
        raise WeightsError(f"the broadcast to its engine failed: {_first_line(error)}") from error


async def _lose_patience(sending: "asyncio.Future[None]", patience: asyncio.Timeout) -> None:
    await asyncio.wait({sending})
    if sending.exception() is not None:
        patience.reschedule(asyncio.get_running_loop().time() + REASON_SECONDS)


def _note(sending: "asyncio.Future[None]") -> None:
    """Log an error for which no task waits any more."""
    if not sending.cancelled() and (error := sending.exception()) is not None:
        log.debug("a broadcast ended: %s", error)


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

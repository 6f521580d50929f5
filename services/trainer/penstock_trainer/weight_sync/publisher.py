"""Pushes a staged version to every live rollout server at once.

Invariant: when `push` returns, each server either reports that it serves exactly this version or is fenced: it takes no
ticket until it has loaded the announced version by itself.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from penstock.broker import Queue
from penstock.contracts import PolicyIdentity, ServerState
from penstock.contracts.services import Announcement, Doubt, ServedWeights, ServiceRecord
from penstock.contracts.weight_sources import LeftParent
from penstock.errors import WeightsError
from penstock.runtime.requests import transport_fault
from penstock_trainer.weight_sync.relay_tree import RelayTree
from penstock_trainer.weight_sync.rollout_client import RolloutClient
from penstock_trainer.weight_sync.transport import Transport

log = logging.getLogger(__name__)

DOUBT_SECONDS = 10.0
WHY_CHARACTERS = 1000


@dataclass(frozen=True)
class Push:
    """The result of a push: names of the servers that serve the version, and reasons of the fenced ones.

    paused_seconds: the longest time for which it stopped the generation of a server. left: the parents that servers
    left, in a tree of servers.
    """

    live: tuple[str, ...]
    fenced: dict[str, str]
    seconds: float
    paused_seconds: float
    left: tuple[LeftParent, ...] = ()


class Publisher:
    """Pushes by one transport."""

    def __init__(
        self,
        queue: Queue,
        client: RolloutClient,
        transport: Transport,
        timeout_seconds: float,
        tree: RelayTree | None = None,
    ) -> None:
        """`tree`: of servers that pass the version on."""
        self._tree = tree
        self._queue = queue
        self._client = client
        self._transport = transport
        self._timeout_seconds = timeout_seconds

    async def push(self, announcement: Announcement) -> Push:
        """Push to all servers with a running engine. None is no error: a new server loads the announced one."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        services = await self._queue.services()
        servers = [each for each in services if _has_engine(each)]
        await self._client.close_others([each.url for each in services])
        if self._tree is not None:
            servers = self._tree.plan(servers)
        results = await asyncio.gather(*(self._push_one(server, announcement) for server in servers))
        fenced = {
            server.name: result for server, result in zip(servers, results, strict=True) if isinstance(result, str)
        }
        served = [result for result in results if not isinstance(result, str)]
        left = tuple(
            each for server, result in zip(servers, results, strict=True) for each in self._left(server, result)
        )
        fenced |= await self._doubt_wrong(servers, left, announcement)
        for name, reason in fenced.items():
            log.error("rollout server %s is fenced: %s", name, reason, extra={"version": announcement.identity.number})
        if fenced and len(fenced) == len(servers):
            log.error(
                "no rollout server serves %s: training stops, after run.stall_seconds, unless one catches up",
                announcement.identity,
            )
        live = tuple(server.name for server in servers if server.name not in fenced)
        paused_seconds = max((each.paused_seconds for each in served), default=0.0)
        return Push(live, fenced, loop.time() - start, paused_seconds, left)

    def _left(self, server: ServiceRecord, result: ServedWeights | str) -> list[LeftParent]:
        """The parents that a server reports to have left. It judges nobody else."""
        if self._tree is None or isinstance(result, str):
            return []
        parents = {each.name for each in self._tree.parents_of(server)}
        return [each for each in result.left if each.name in parents]

    async def _doubt_wrong(
        self, servers: Sequence[ServiceRecord], left: Sequence[LeftParent], announcement: Announcement
    ) -> dict[str, str]:
        """Fence the servers that sent wrong bytes to others; their names and the reasons."""
        if self._tree is None:
            return {}
        self._tree.note(left)
        wrong = {each.name: f"another server left it: {each.detail}" for each in left if each.reason == "wrong"}
        doubted = [server for server in servers if server.name in wrong]
        await asyncio.gather(*(self._doubt(each, announcement, wrong[each.name]) for each in doubted))
        return {server.name: wrong[server.name] for server in doubted}

    async def _doubt(self, server: ServiceRecord, announcement: Announcement, why: str) -> None:
        """Let a server that sent wrong bytes load its weights anew. One that does not answer is fenced all the same."""
        try:
            async with asyncio.timeout(DOUBT_SECONDS):
                await self._client.doubt(server.url, Doubt(announcement.lease, why[:WHY_CHARACTERS]))
        except (WeightsError, TimeoutError, httpx.HTTPError) as error:
            log.warning("rollout server %s was not asked to load its weights anew: %s", server.name, error)

    async def _push_one(self, server: ServiceRecord, announcement: Announcement) -> ServedWeights | str:
        """What the server serves now, which is the version, or the reason why it does not."""
        try:
            async with (
                asyncio.timeout(self._timeout_seconds),
                self._transport.delivery(server, announcement) as source,
            ):
                return await self._client.put_weights(server.url, announcement, source)
        except WeightsError as error:
            return str(error)
        except TimeoutError:
            return f"no answer within {self._timeout_seconds:.0f} s (weights.push_timeout_seconds)"
        except httpx.HTTPError as error:
            return transport_fault(error)


class Fences:
    """The fenced servers of one trainer."""

    def __init__(self) -> None:
        self._missed: dict[str, PolicyIdentity] = {}

    def pushed(self, announcement: Announcement, push: Push) -> None:
        """Note which servers took a version and which did not."""
        for name in push.live:
            self._missed.pop(name, None)
        self._missed.update(dict.fromkeys(push.fenced, announcement.identity))

    def server_states(self, records: Sequence[ServiceRecord]) -> Counter[ServerState]:
        """Rollout servers by state, from their records and the pushes."""
        servers = [(record, state) for record in records if (state := record.server_state) is not None]
        self._missed = {
            record.name: self._missed[record.name]
            for record, _ in servers
            if record.name in self._missed and not _serves(record, self._missed[record.name])
        }
        return Counter(ServerState.FENCED if record.name in self._missed else state for record, state in servers)


def _has_engine(record: ServiceRecord) -> bool:
    waits = record.server_state is ServerState.ASLEEP and not record.engine  # until the trainer's turn is over
    return record.server_state not in (None, ServerState.STARTING) and not waits


def _serves(record: ServiceRecord, wanted: PolicyIdentity) -> bool:
    return record.policy is not None and (record.policy == wanted or record.policy.number > wanted.number)

"""The versions that this server has received from others, and passes on: `weights.relay_fan_out`.

Owns their files, in a folder of this process on its own host. Invariants: there are two versions at most, that which
was loaded last and the one that arrives; a version is loaded only after all its tensors were compared with its identity
(`manifest.verify`), as from a shared folder.
"""

import asyncio
import logging
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from pydantic import SecretStr

from penstock.contracts import PolicyIdentity, ServiceKind
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.weight_sources import LeftParent, Parent
from penstock.errors import WeightsError
from penstock.weights.chunks import ChunkList
from penstock.weights.local_folder import LocalFolder
from penstock.weights.relay import HeldVersion, Relay
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.fetch import Fetch, no_room

log = logging.getLogger(__name__)

COPIES = 2
NUM_PEERS = 2  # that a server that is behind asks before the trainer

Services = Callable[[], Awaitable[list[ServiceRecord]]]


class RelayedVersions:
    """The versions of one rollout service."""

    def __init__(
        self,
        claim: Callable[[int], LocalFolder],
        services: Services,
        token: SecretStr | None,
        metrics: RolloutMetrics,
        name: str,
    ) -> None:
        """`claim`: bytes needed -> the folder of the versions. `name`: of this service."""
        self.relay = Relay(metrics.relay_sent)
        self._claim = claim
        self._services = services
        self._token = token
        self._metrics = metrics
        self._name = name
        self._folder: LocalFolder | None = None
        self._versions: dict[str, HeldVersion] = {}
        self._loaded = ""
        self._num_begun = 0

    async def bring(
        self, wanted: Announcement, parents: tuple[Parent, ...], seconds: float
    ) -> tuple[Path, tuple[LeftParent, ...]]:
        """The folder with the files of `wanted`, which others may fetch from here meanwhile; and who was left for it.

        `parents`: in their order; empty for servers that serve the version, then the trainer. WeightsError: nobody sent
        it, or there is no room. TimeoutError: it took longer than `seconds`.
        """
        if not wanted.chunks:
            raise WeightsError(
                f"{wanted.identity} was staged without a list of chunks: expected trainer and rollout services to have "
                "the same weights.relay_fan_out"
            )
        if (held := self._versions.get(wanted.chunks)) is not None and held.is_complete:
            return held.folder, ()
        await self._keep({self._loaded})
        fetch = Fetch(
            wanted.chunks,
            parents or await self._serving(wanted.identity),
            self._token,
            begin=lambda chunks: self._begin(wanted, chunks),
            received=self._metrics.relay_received,
            seconds=seconds,
        )
        try:
            held = await _in_thread(fetch)
        except BaseException:
            await self._keep({self._loaded})  # those who wait for more of it ask their next parents
            raise
        finally:
            for each in fetch.left:
                self._metrics.parent_left(each.reason)
                log.warning("left %s, which is %s: %s", each.name, each.reason, each.detail)
        log.info("received %s from %s", wanted.identity, fetch.sender, extra={"num_bytes": fetch.num_bytes})
        return held.folder, tuple(fetch.left)

    def loaded(self, wanted: Announcement) -> None:
        """The engine has loaded this version: earlier ones go when the next one comes."""
        self._loaded = wanted.chunks

    async def forget(self) -> None:
        """Remove every version: what is here is doubted. None is passed on, or found here, from this call on."""
        self._loaded = ""
        await self._keep(set())

    def close(self) -> None:
        """Remove everything."""
        self._take_out(set())
        if self._folder is not None:
            self._folder.release()
            self._folder = None

    async def _serving(self, identity: PolicyIdentity) -> tuple[Parent, ...]:
        """Some servers that serve a version, and the trainer: for a server that is behind."""
        records = await self._services()
        peers = [each for each in records if each.policy == identity and each.server_state and each.name != self._name]
        trainers = [each for each in records if each.kind is ServiceKind.TRAINER]
        asked = [*random.sample(peers, min(NUM_PEERS, len(peers))), *trainers[-1:]]
        if not asked:
            raise WeightsError(f"no server serves {identity}, and no trainer runs that could send it")
        return tuple(Parent(each.name, each.url) for each in asked)

    def _begin(self, wanted: Announcement, chunks: ChunkList) -> HeldVersion:
        """The place of a version that arrives. In a thread."""
        if self._folder is None:
            self._folder = self._claim(COPIES * chunks.num_bytes)
            _remove([path for path in self._folder.path.iterdir() if path.is_dir()])  # of a life that was killed
        self._num_begun += 1
        folder = self._folder.path / f"{wanted.identity.number:08d}.{wanted.lease}-{self._num_begun}"
        try:
            folder.mkdir()
            held = HeldVersion(folder, chunks, complete=False)
        except OSError as error:
            raise no_room(folder, error) from error
        self._versions[held.digest] = held
        self.relay.hold(held)
        return held

    async def _keep(self, digests: set[str]) -> None:
        """Remove all versions but these."""
        await asyncio.to_thread(_remove, self._take_out(digests))

    def _take_out(self, digests: set[str]) -> list[Path]:
        """Pass on no version but these; the folders of the others."""
        self.relay.drop_all_but(digests)
        gone = [held.folder for digest, held in self._versions.items() if digest not in digests]
        self._versions = {digest: held for digest, held in self._versions.items() if digest in digests}
        return gone


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


async def _in_thread(fetch: Fetch) -> HeldVersion:
    """Run it; if this is cancelled, end it first: its thread writes into files that would be removed."""
    running = asyncio.ensure_future(asyncio.to_thread(fetch.run))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        fetch.end()
        await asyncio.wait({running})
        raise

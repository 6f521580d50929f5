"""How the engine gets the bytes of a version: one loader per transport.

Invariant: `prepare` changes nothing that is served; `load` runs while generation is paused, and after it the engine
holds every weight of the version or has to be restarted. Made by `app` and `producer`, called by `weights`.
"""

import asyncio
from pathlib import Path
from typing import Protocol

from penstock.broker import Announcement
from penstock.errors import WeightsError
from penstock.manifest import read_manifest, verify
from penstock.transfer import Source
from penstock_rollout.engine.client import EngineClient


class Loader(Protocol):
    """One version on its way into the engine."""

    transport: str

    async def prepare(self, wanted: Announcement) -> None:
        """Before generation pauses: WeightsError when the bytes are not those that were announced."""

    async def load(self, wanted: Announcement, client: EngineClient, timeout_seconds: float) -> None:
        """While it is paused: replace all weights."""


class DiskLoader:
    """From files in a folder that trainer and servers share."""

    transport = "disk"

    async def prepare(self, wanted: Announcement) -> None:
        folder = Path(wanted.path)
        manifest = await asyncio.to_thread(read_manifest, folder)
        if manifest.identity != wanted.identity:
            raise WeightsError(
                f"{folder} holds {manifest.version}-{manifest.digest}; expected "
                f"{wanted.identity.number}-{wanted.identity.digest}; weights.folder must be shared with the trainer"
            )
        await asyncio.to_thread(verify, folder, manifest)

    async def load(self, wanted: Announcement, client: EngineClient, timeout_seconds: float) -> None:
        await client.load(wanted.path, str(wanted.identity), timeout_seconds)


def make_loader(source: Source) -> Loader:
    """The loader of a pushed source."""
    return DiskLoader()

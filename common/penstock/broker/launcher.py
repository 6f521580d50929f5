"""The calls to Redis that only a launcher makes: it holds the run from before anything is deleted to its end.

Invariant: of launches of one name that start at the same moment, one holds the run and the others change nothing. A
launcher that was killed holds it for as long as a heartbeat.
"""

import asyncio
import uuid
from collections.abc import Callable

from penstock.broker.identity import Renewals
from penstock.broker.queue import Queue
from penstock.broker.renewal import RETRY_SECONDS, Renewal
from penstock.broker.scripts import Given, Script
from penstock.config import Config
from penstock.errors import ConfigError
from penstock.run_home import RunHome

HOLD = Script("launcher/hold")
RENEW = Script("launcher/renew")
RELEASE = Script("launcher/release")


class HeldRun(Renewal):
    """A run that this launcher holds. `folder`: the id of its folder from now on."""

    def __init__(self, token: str, folder: str, queue: Queue, config: Config) -> None:
        self.folder = folder
        keys, ttl_seconds = queue.keys, config.staleness.heartbeat_seconds
        renewal = RENEW(
            identity=keys.identity,
            launcher=keys.launcher,
            token=token,
            alive_ms=int(ttl_seconds * 1000),
            folder=folder,
            **queue.identity.compared,
        )
        released = RELEASE(launcher=keys.launcher, token=token)
        super().__init__(f"the hold of run {config.run.name}", config.redis, renewal, released, ttl_seconds)


async def hold_run(queue: Queue, config: Config, home: RunHome, on_wait: Callable[[str], None]) -> HeldRun:
    """Hold the run, and be its owner. Call it with the folder's lock held.

    If another process holds it, this waits until that renews (StrangerError) or turns out to be dead; `on_wait` is
    called with the reason. ConfigError: the run's state is in another folder, or run.existing is refuse.
    """
    keys, others, warned = queue.keys, Renewals(), False
    ttl_seconds, existing = config.staleness.heartbeat_seconds, config.run.existing
    owner: dict[str, Given] = queue.identity.for_owner(home)
    token = uuid.uuid4().hex
    while True:
        outcome, *answer = await queue.run(
            HOLD(
                identity=keys.identity,
                lease=keys.lease,
                launcher=keys.launcher,
                ledger=keys.ledger,
                services=keys.services,
                token=token,
                alive_ms=int(ttl_seconds * 1000),
                existing=existing,
                **owner,
            )
        )
        if outcome == b"own":
            return HeldRun(token, answer[0].decode(), queue, config)
        if outcome == b"elsewhere":
            raise await _exists(queue, config) if existing == "refuse" else await queue.elsewhere()
        if others.seen(answer):
            raise await queue.stranger(deletes=existing == "replace")
        if not warned:
            on_wait(
                "queue: another process held this run a moment ago; "
                f"looking whether it lives (up to {ttl_seconds:g} s, staleness.heartbeat_seconds)"
            )
            warned = True
        await asyncio.sleep(RETRY_SECONDS)


async def _exists(queue: Queue, config: Config) -> ConfigError:
    return ConfigError(
        f"run.existing is refuse and Redis at {queue.shown_url} holds an earlier run {config.run.name!r} "
        f"({await queue.contents()}); choose another run.name, or set run.existing to resume"
    )

"""The trainer's lease: at any time one process may write versions, tickets and the ledger.

Owns its token, `number:random id`, which every script that requires the lease compares in full. Numbers only grow:
rollout servers refuse a push with a lower one. Who takes the lease while no launcher holds the run is the run's owner
(`penstock.broker.identity`).
"""

import asyncio
import logging
import uuid
from typing import Any

from penstock.broker.identity import Renewals
from penstock.broker.queue import Queue
from penstock.broker.renewal import RETRY_SECONDS, Renewal
from penstock.broker.scripts import Script
from penstock.config import Config
from penstock.errors import StallError
from penstock.run_home import RunHome

log = logging.getLogger(__name__)

ACQUIRE = Script("trainer/acquire_lease")
RENEW = Script("trainer/renew_lease")
RELEASE = Script("trainer/release_lease")


class Lease(Renewal):
    """A held lease. Rollout servers check its `number`, scripts its `token`."""

    def __init__(self, token: str, folder: str, queue: Queue, config: Config) -> None:
        """`folder`: the id of the run's folder."""
        self.token = token
        self.number = int(token.partition(":")[0])
        keys, ttl_seconds = queue.keys, config.staleness.heartbeat_seconds
        renewal = RENEW(
            lease=keys.lease,
            last_number=keys.last_lease,
            identity=keys.identity,
            token=token,
            alive_ms=int(ttl_seconds * 1000),
            folder=folder,
            **queue.identity.compared,
        )
        released = RELEASE(lease=keys.lease, token=token)
        super().__init__("the lease", config.redis, renewal, released, ttl_seconds)

    async def renew(self, queue: Queue) -> None:
        """Renew now; an expired lease is held again unless another trainer has had it (LeaseLostError) or may have."""
        await queue.run(self._renewal)


async def acquire_lease(queue: Queue, config: Config, home: RunHome | None = None, *, above: int = 0) -> Lease:
    """Wait until no other trainer holds the lease, then hold it; StallError after a while without trainer.standby.

    StrangerError: a trainer or launcher of another configuration or folder lives. ConfigError: the run's state is in
    another folder. home: the run's folder; None: a tool that has none.
    above: a number that servers know. They, and `home`, remember numbers that a queue which lost its last writes would
    give out again.
    """
    deadline = asyncio.get_running_loop().time() + config.run.stall_seconds
    others, warned = Renewals(), False
    while True:
        outcome, *answer = await _ask(queue, config, home, above)
        match outcome:
            case b"leased":
                token, folder = map(bytes.decode, answer)
                lease = Lease(token, folder, queue, config)
                if home:
                    home.keep(folder)
                    home.keep_lease(lease.number)
                return lease
            case b"elsewhere":
                raise await queue.elsewhere()
            case b"another" if others.seen(answer):
                raise await queue.stranger()
        if not warned:
            log.info("another trainer of run %s holds the lease: waiting for its end", config.run.name)
            warned = True
        if not config.trainer.standby and asyncio.get_running_loop().time() > deadline:
            raise StallError(
                f"waited {config.run.stall_seconds:.0f} s (run.stall_seconds) for the lease of run {config.run.name}: "
                "another trainer of that name is running; end it, choose another run.name, or set trainer.standby"
            )
        await asyncio.sleep(RETRY_SECONDS)


async def _ask(queue: Queue, config: Config, home: RunHome | None, above: int) -> Any:
    keys = queue.keys
    return await queue.run(
        ACQUIRE(
            lease=keys.lease,
            last_number=keys.last_lease,
            identity=keys.identity,
            launcher=keys.launcher,
            ledger=keys.ledger,
            random_id=uuid.uuid4().hex[:12],
            alive_ms=int(config.staleness.heartbeat_seconds * 1000),
            above=max(above, home.last_lease()) if home else above,
            **queue.identity.for_owner(home),
        )
    )

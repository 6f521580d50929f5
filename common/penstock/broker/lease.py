"""The trainer's lease: at any time one process may write versions, tickets and the ledger.

Owns its token, `number:random id`, which every script that requires the lease compares in full. Owns also the thread
that renews the lease, so a busy event loop does not lose it. Numbers only grow: rollout servers refuse a push with a
lower one.
"""

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError, RedisError, TimeoutError
from redis.retry import Retry

from penstock.broker.queue import Queue, disk_is_full, refusal
from penstock.broker.scripts import Script, ScriptCall
from penstock.config import Config
from penstock.errors import QueueError, StallError

log = logging.getLogger(__name__)

ACQUIRE = Script("trainer/acquire_lease")
RENEW = Script("trainer/renew_lease")
RELEASE = Script("trainer/release_lease")
RENEWALS_PER_TTL = 3
RETRY_SECONDS = 0.25


class Lease:
    """A held lease. Rollout servers check its `number`, scripts its `token`."""

    def __init__(self, token: str, url: str, password: str | None, key: str, last_key: str, ttl_seconds: float) -> None:
        self.token = token
        self.number = int(token.partition(":")[0])
        self._key = key
        self._ttl_seconds = ttl_seconds
        self._renewal = RENEW(lease=key, last_number=last_key, token=token, alive_ms=int(ttl_seconds * 1000))
        self._stopped = threading.Event()
        self._client = redis.Redis.from_url(
            url,
            password=password,
            socket_timeout=ttl_seconds,
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 3),
            retry_on_error=[ConnectionError, TimeoutError],
        )
        self._thread: threading.Thread | None = None

    def start_renewing(self, on_loss: Callable[[QueueError], None]) -> None:
        """Renew from a thread; `on_loss` is called there once, with the error, if the lease is lost."""
        self._thread = threading.Thread(target=self._renew, args=(on_loss,), name="lease", daemon=True)
        self._thread.start()

    async def renew(self, queue: Queue) -> None:
        """Renew now; an expired lease is held again unless another trainer has had it (LeaseLostError) or may have."""
        await queue.run(self._renewal)

    def release(self) -> None:
        """Stop renewing and give the lease up, so that another trainer need not wait for it to expire."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=self._ttl_seconds)
        try:
            self._evaluate(RELEASE(lease=self._key, token=self.token))
        except RedisError as error:
            log.warning("the lease could not be given up (%s); it expires in %s s", error, self._ttl_seconds)
        self._client.close()

    def _renew(self, on_loss: Callable[[QueueError], None]) -> None:
        while not self._stopped.wait(self._ttl_seconds / RENEWALS_PER_TTL):
            try:
                self._evaluate(self._renewal)
            except (ConnectionError, TimeoutError) as error:
                log.warning("the lease could not be renewed yet: %s", error)
            except RedisError as error:
                if disk_is_full(error):
                    log.warning("the lease could not be renewed yet: %s", error)
                    continue
                on_loss(refusal(str(error)) or QueueError(f"the lease {self.token} could not be renewed: {error}"))
                return

    def _evaluate(self, call: ScriptCall) -> None:
        self._client.eval(call.script.text, len(call.keys), *call.keys, *call.arguments)


async def acquire_lease(queue: Queue, config: Config, *, above: int = 0) -> Lease:
    """Wait until no other trainer holds the lease, then hold it; StallError after a while without trainer.standby.

    above: the highest number found elsewhere; a queue that lost its last writes would give that number out again.
    """
    ttl_seconds = config.staleness.heartbeat_seconds
    keys = queue.keys
    deadline = asyncio.get_running_loop().time() + config.run.stall_seconds
    warned = False
    while True:
        answer = await queue.run(
            ACQUIRE(
                lease=keys.lease,
                last_number=keys.last_lease,
                random_id=uuid.uuid4().hex[:12],
                alive_ms=int(ttl_seconds * 1000),
                above=above,
            )
        )
        if answer:
            password = config.redis.password.get_secret_value() if config.redis.password else None
            return Lease(answer[0].decode(), config.redis.url, password, keys.lease, keys.last_lease, ttl_seconds)
        if not warned:
            log.info("another trainer of run %s holds the lease: waiting for its end", config.run.name)
            warned = True
        if not config.trainer.standby and asyncio.get_running_loop().time() > deadline:
            raise StallError(
                f"waited {config.run.stall_seconds:.0f} s (run.stall_seconds) for the lease of run {config.run.name}: "
                "another trainer of that name is running; end it, choose another run.name, or set trainer.standby"
            )
        await asyncio.sleep(RETRY_SECONDS)

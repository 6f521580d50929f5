"""The trainer's lease: at any time one process may write versions, tickets and the ledger.

Owns its token, `number:random id`, compared whole by every fenced script, and the thread that renews it, so that a busy
event loop does not lose it. Numbers only grow: rollout servers refuse a push with a lower one.
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

from penstock.broker import trainer_scripts as scripts
from penstock.broker.queue import Queue, refusal
from penstock.config import Config
from penstock.errors import QueueError, StallError

log = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3
RETRY_SECONDS = 0.25


class Lease:
    """A held lease. `number` fences pushes, `token` fences scripts."""

    def __init__(self, token: str, url: str, password: str | None, key: str, last_key: str, ttl_seconds: float) -> None:
        self.token = token
        self.number = int(token.partition(":")[0])
        self._key = key
        self._last_key = last_key
        self._ttl_seconds = ttl_seconds
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
        """Renew from a thread; `on_loss` is called there once, with the error, when the lease is gone."""
        self._thread = threading.Thread(target=self._renew, args=(on_loss,), name="lease", daemon=True)
        self._thread.start()

    async def renew(self, queue: Queue) -> None:
        """Renew now; holds it again after it expired unless another trainer has had it (LeaseLostError) or may have."""
        await queue.run(scripts.RENEW_LEASE, [self._key, self._last_key], [self.token, int(self._ttl_seconds * 1000)])

    def release(self) -> None:
        """Stop renewing and give the lease up, so that another trainer need not wait for it to expire."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=self._ttl_seconds)
        try:
            self._client.eval(scripts.RELEASE_LEASE, 1, self._key, self.token)
        except RedisError as error:
            log.warning("the lease could not be given up (%s); it expires in %s s", error, self._ttl_seconds)
        self._client.close()

    def _renew(self, on_loss: Callable[[QueueError], None]) -> None:
        milliseconds = int(self._ttl_seconds * 1000)
        while not self._stopped.wait(self._ttl_seconds / RENEWALS_PER_TTL):
            try:
                self._client.eval(scripts.RENEW_LEASE, 2, self._key, self._last_key, self.token, milliseconds)
            except (ConnectionError, TimeoutError) as error:
                log.warning("the lease could not be renewed yet: %s", error)
            except RedisError as error:
                on_loss(refusal(str(error)) or QueueError(f"the lease {self.token} could not be renewed: {error}"))
                return


async def acquire_lease(queue: Queue, config: Config, *, above: int = 0) -> Lease:
    """Wait until no other trainer holds the lease, then hold it; without trainer.standby StallError after a while.

    above: the highest number that is known from elsewhere: a queue that lost its last writes would give it out again.
    """
    ttl_seconds = config.staleness.heartbeat_seconds
    keys = queue.keys
    deadline = asyncio.get_running_loop().time() + config.run.stall_seconds
    warned = False
    while True:
        answer = await queue.run(
            scripts.ACQUIRE_LEASE,
            [keys.lease, keys.last_lease],
            [uuid.uuid4().hex[:12], int(ttl_seconds * 1000), above],
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

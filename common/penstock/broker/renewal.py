"""A right in Redis that lasts a while, and the thread that renews it, so that a busy event loop does not lose it.

A Redis that is away or full loses no right: nobody can take it there, and it is renewed once that has passed.
"""

import logging
import threading
from collections.abc import Callable

import redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError, OutOfMemoryError, RedisError, TimeoutError
from redis.retry import Retry

from penstock.broker.queue import disk_is_full, refusal
from penstock.broker.scripts import ScriptCall
from penstock.config import RedisSection
from penstock.errors import PenstockError, QueueError

log = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3
RETRY_SECONDS = 0.25  # between two attempts to get a right that another holds: its end raises no event
MAY_PASS = (ConnectionError, TimeoutError, OutOfMemoryError)  # the server is away or full


class Renewal:
    """A right that is held now. `name`: for messages."""

    def __init__(
        self, name: str, section: RedisSection, renewal: ScriptCall, release: ScriptCall, ttl_seconds: float
    ) -> None:
        self._name = name
        self._renewal = renewal
        self._release = release
        self._ttl_seconds = ttl_seconds
        self._stopped = threading.Event()
        self._client = redis.Redis.from_url(
            section.url,
            password=section.password.get_secret_value() if section.password else None,
            socket_timeout=ttl_seconds,
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=1.0), 3),
            retry_on_error=[ConnectionError, TimeoutError],
        )
        self._thread: threading.Thread | None = None

    def start_renewing(self, on_loss: Callable[[PenstockError], None]) -> None:
        """Renew from a thread; `on_loss` is called there once, with the error, if the right is lost."""
        self._thread = threading.Thread(target=self._renew, args=(on_loss,), name=self._name, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop renewing and give the right up, so that another need not wait for it to expire. Blocks."""
        self._stop()
        try:
            self._evaluate(self._release)
        except RedisError as error:
            log.warning("%s could not be given up (%s); it expires in %s s", self._name, error, self._ttl_seconds)
        self._client.close()

    def abandon(self) -> None:
        """Stop renewing, and let the right expire. Blocks."""
        self._stop()
        self._client.close()

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=self._ttl_seconds)

    def _renew(self, on_loss: Callable[[PenstockError], None]) -> None:
        while not self._stopped.wait(self._ttl_seconds / RENEWALS_PER_TTL):
            try:
                self._evaluate(self._renewal)
            except RedisError as error:
                if not (isinstance(error, MAY_PASS) or disk_is_full(error)):
                    on_loss(refusal(str(error)) or QueueError(f"{self._name} could not be renewed: {error}"))
                    return
                log.warning("%s could not be renewed yet: %s", self._name, error)

    def _evaluate(self, call: ScriptCall) -> None:
        self._client.eval(call.script.text, len(call.keys), *call.keys, *call.arguments)

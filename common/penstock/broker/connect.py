"""Connects to the server of redis.url, with the checks and retries that every service needs.

Owns the client's settings. Invariant: a queue that `connect` returns is on a server that can keep a run.
"""

from typing import Any

import redis.asyncio as aioredis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import AuthenticationError, ConnectionError, TimeoutError

from penstock.broker.identity import RunIdentity
from penstock.broker.keys import Keys
from penstock.broker.memory import MemoryUse, check_memory, memory_use, needed_bytes
from penstock.broker.queue import Queue
from penstock.config import Config
from penstock.config.secrets import shown_url
from penstock.config.shown import secret_values
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError

CONNECT_TIMEOUT_SECONDS = 10.0
BACKOFF_CAP_SECONDS = 1.0


async def connect(config: Config, kind: ServiceKind = ServiceKind.TRAINER, *, known_only: bool = False) -> Queue:
    """Connect and check the server; QueueError or ConfigError with redis.url if it cannot serve.

    `kind`: of the service that connects; a launcher, and who only reads, has the keys of a trainer.
    `known_only`: create nothing there; ConfigError if it holds nothing of the run.
    """
    queue = _queue(config, kind)
    try:
        await queue.check_server(make_groups=not known_only)
        if known_only:
            await queue.require_run(config.run.name)
        await queue.close_idle()
    except BaseException:
        await queue.close()
        raise
    return queue


async def examine_server(config: Config) -> tuple[str, MemoryUse]:
    """Name and version of the server, and its memory; the errors of `connect`, or ConfigError if the run needs more.

    Writes nothing.
    """
    queue = _queue(config, ServiceKind.TRAINER)
    try:
        version = await queue.check_server(make_groups=False)
        await check_memory(queue, needed_bytes(config))
        return version, await memory_use(queue)
    finally:
        await queue.close()


def _queue(config: Config, kind: ServiceKind) -> Queue:
    """A queue that has not connected yet; ConfigError without redis.url."""
    section = config.redis
    if not section.url:
        raise ConfigError(
            "redis.url is empty; expected redis://host:port, or `penstock launch local`, which starts one"
        )
    attempts = max(3, int(section.timeout_seconds / BACKOFF_CAP_SECONDS))
    client = aioredis.Redis.from_url(
        section.url,
        password=section.password.get_secret_value() if section.password else None,
        # With a timeout redis-py sends through asyncio.wait_for, which on Python 3.11 loses a cancellation that
        # arrives as the call ends: the service would never stop (docs/adr/0002). `guard` has the deadline instead.
        socket_timeout=None,
        socket_connect_timeout=CONNECT_TIMEOUT_SECONDS,
        health_check_interval=15,
        retry=_RetryUnlessRefused(ExponentialWithJitterBackoff(base=0.02, cap=BACKOFF_CAP_SECONDS), attempts),
        retry_on_error=[ConnectionError, TimeoutError, OSError],
    )
    keys, identity = Keys(config.run.name), RunIdentity.of(config, kind)
    shown, secrets = shown_url(section.url), secret_values(config)
    return Queue(client, keys, identity, shown, section.timeout_seconds, secrets)


class _RetryUnlessRefused(Retry):
    """Repeats a call after a broken connection, but not after a refused password, which redis-py counts as one."""

    async def call_with_retry(
        self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False
    ) -> Any:
        def may_repeat(error: Exception) -> bool:
            return not isinstance(error, AuthenticationError) and (is_retryable is None or is_retryable(error))

        return await super().call_with_retry(do, fail, may_repeat, with_failure_count)

"""How much memory the queue's server uses, may use, and can need.

Owns that arithmetic. A server without a limit of its own is bounded by the memory of its host.
"""

from dataclasses import dataclass

from penstock.broker.queue import Queue
from penstock.config import Config
from penstock.errors import ConfigError

BYTES_PER_TOKEN = 13  # 8 of a completion, the rest for text, a mask where there is one, and overhead


@dataclass(frozen=True)
class MemoryUse:
    """limit_bytes: maxmemory, or the host's memory where the server has no limit; 0 where neither is known."""

    used_bytes: int
    limit_bytes: int


def needed_bytes(config: Config) -> int:
    """What outstanding groups can take in the queue at the most."""
    num_tokens = config.max_outstanding * config.actor.group_size * config.sampling.max_new_tokens
    return num_tokens * BYTES_PER_TOKEN


async def check_memory(queue: Queue, needed: int) -> None:
    """ConfigError when the server may not use as many bytes as the run can need."""
    limit = int((await _info(queue)).get("maxmemory", 0))
    if limit and limit < needed:
        raise ConfigError(
            f"Redis at {queue.shown_url} may use {limit / 2**20:.0f} MiB and this run can need "
            f"{needed / 2**20:.0f} MiB for outstanding groups; raise its maxmemory, or lower "
            "data.batch_size, actor.group_size, sampling.max_new_tokens or staleness.max_staleness"
        )


async def memory_use(queue: Queue) -> MemoryUse:
    """At the moment."""
    info = await _info(queue)
    limit = int(info.get("maxmemory", 0)) or int(info.get("total_system_memory", 0))
    return MemoryUse(int(info["used_memory"]), limit)


async def _info(queue: Queue) -> dict[str, int]:
    found: dict[str, int] = await queue.guard(queue.client.info("memory"))
    return found

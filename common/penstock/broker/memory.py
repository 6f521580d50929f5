"""How much memory the queue's server uses, may use, and can need.

Owns that arithmetic. The memory of the host bounds a server without a limit of its own.
"""

from dataclasses import dataclass

from penstock.broker.queue import Queue
from penstock.config import Config
from penstock.errors import ConfigError

BYTES_PER_TOKEN = 13  # 8 of a sampled token, the rest for text, the mask if there is one, and overhead


@dataclass(frozen=True)
class MemoryUse:
    """limit_bytes: maxmemory, or the host's memory if the server has no limit; 0 if neither is reported."""

    used_bytes: int
    limit_bytes: int


def needed_bytes(config: Config) -> int:
    """The most that outstanding groups can take in the queue: of an episode, one path of the largest length."""
    longest = config.agent.max_tokens if config.agent.enabled else config.sampling.max_new_tokens
    return config.max_outstanding * config.actor.group_size * longest * BYTES_PER_TOKEN


async def check_memory(queue: Queue, needed: int) -> None:
    """ConfigError if the server may use fewer bytes than the run can need."""
    limit = int((await _info(queue)).get("maxmemory", 0))
    if limit and limit < needed:
        raise ConfigError(
            f"Redis at {queue.shown_url} may use {limit / 2**20:.0f} MiB and this run can need "
            f"{needed / 2**20:.0f} MiB for outstanding groups; raise its maxmemory, or lower "
            "data.batch_size, actor.group_size, staleness.max_staleness, sampling.max_new_tokens, or agent.max_tokens "
            "in a run of episodes"
        )


async def memory_use(queue: Queue) -> MemoryUse:
    """The use at this moment."""
    info = await _info(queue)
    limit = int(info.get("maxmemory", 0)) or int(info.get("total_system_memory", 0))
    return MemoryUse(int(info["used_memory"]), limit)


async def _info(queue: Queue) -> dict[str, int]:
    found: dict[str, int] = await queue.guard(queue.client.info("memory"))
    return found

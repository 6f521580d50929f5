"""What a run costs while it goes on: CPU time between two steps, and memory over time.

Owns both figures' definitions. Invariant: CPU time is counted from the commit of one step to that of another, so that
as many groups lie in between as were trained. Steps are counted by the ledger's entries, memory is that of the kernel
and of the queue's server; nothing is asked of the trainer.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import redis.asyncio as aioredis

LOOK_SECONDS = 0.1
WARM_UP_SHARE = 1 / 3  # of the samples of memory: caches fill, new servers connect
LEAST_SAMPLES = 4
MOST_GROWTH = 0.05  # of the memory, over the measured samples: what "flat" means
SMALL_GROWTH_BYTES = 16 * 2**20  # is flat too: a few of the server's or the allocator's own blocks


class LedgerWatch:
    """Follows the ledger of a run, by its own reading of the records."""

    def __init__(self, client: "aioredis.Redis", run: str) -> None:
        self._client: Any = client
        self._key = f"penstock:{{{run}}}:ledger"
        self._last = b"-"
        self.num_steps = 0
        self.num_trained = 0
        self.num_versions = 0

    async def look(self) -> None:
        first = b"(" + self._last if self._last != b"-" else self._last
        for entry, fields in await self._client.xrange(self._key, min=first):
            self._last = entry
            record = json.loads(fields[b"r"])
            if record["record"] == "step":
                self.num_steps += 1
                self.num_trained += len(record["tickets"])
            self.num_versions += record["record"] == "weights"

    async def next_step(self, deadline_seconds: float, require_alive: Callable[[], None]) -> None:
        """Return when a further step is committed. TimeoutError: none was. `require_alive` may raise meanwhile."""
        async with asyncio.timeout(deadline_seconds):
            before = self.num_steps
            while self.num_steps == before:
                await asyncio.sleep(LOOK_SECONDS)
                require_alive()
                await self.look()


@dataclass(frozen=True)
class Moment:
    """The counts at the commit of a step. cpu_seconds: of each process, by name."""

    at: float
    num_trained: int
    num_steps: int
    cpu_seconds: Mapping[str, float]


@dataclass(frozen=True)
class Window:
    """What lies between two moments."""

    num_services: int
    seconds: float
    num_steps: int
    num_groups: int
    us_per_group: Mapping[str, float]
    """CPU time of each process, in microseconds."""

    @property
    def groups_per_second(self) -> float:
        return self.num_groups / self.seconds


def moment(watch: LedgerWatch, processes: Mapping[str, psutil.Process]) -> Moment:
    """The counts now."""
    cpu = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    return Moment(time.monotonic(), watch.num_trained, watch.num_steps, cpu)


def window(num_services: int, before: Moment, after: Moment) -> Window:
    """ValueError if no group was trained in between."""
    num_groups = after.num_trained - before.num_trained
    if not num_groups:
        raise ValueError(f"no group was trained with {num_services} services; expected a step: raise --seconds")
    us = {name: 1e6 * (after.cpu_seconds[name] - before.cpu_seconds[name]) / num_groups for name in after.cpu_seconds}
    return Window(num_services, after.at - before.at, after.num_steps - before.num_steps, num_groups, us)


@dataclass(frozen=True)
class Growth:
    """A line through the samples of a memory, without those of the warm-up."""

    mean_bytes: float
    bytes_per_hour: float
    share: float
    """What it grew by over these samples, as a share of the mean."""
    is_flat: bool


def growth(samples: Sequence[tuple[float, float]]) -> Growth | None:
    """samples: seconds and bytes, in order. The line of least squares; None if there are too few of them."""
    kept = samples[int(len(samples) * WARM_UP_SHARE) :]
    if len(kept) < LEAST_SAMPLES:
        return None
    mean_at = sum(at for at, _ in kept) / len(kept)
    mean = sum(value for _, value in kept) / len(kept)
    slope = sum((at - mean_at) * (value - mean) for at, value in kept) / sum((at - mean_at) ** 2 for at, _ in kept)
    grown = slope * (kept[-1][0] - kept[0][0])
    return Growth(mean, 3600 * slope, grown / mean, grown <= max(MOST_GROWTH * mean, SMALL_GROWTH_BYTES))


class MemorySamples:
    """Resident bytes of processes, and the bytes that the queue's server counts as used."""

    def __init__(self, client: "aioredis.Redis", processes: Mapping[str, psutil.Process]) -> None:
        self._client: Any = client
        self._processes = processes
        self.taken: dict[str, list[tuple[float, float]]] = {name: [] for name in (*processes, "queue, used")}

    async def sample(self, every_seconds: float) -> None:
        """For ever."""
        while True:
            at = time.monotonic()
            for name, process in self._processes.items():
                self.taken[name].append((at, float(process.memory_info().rss)))
            info = await self._client.info("memory")
            self.taken["queue, used"].append((at, float(info["used_memory"])))
            await asyncio.sleep(every_seconds)

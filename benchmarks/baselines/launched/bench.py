"""One engine and one queue that serve many runs: starting SGLang costs half a minute, more than some runs take.

Owns both processes and the CPU seconds that the engine has used. Invariant: neither outlives this process.
"""

import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config
from penstock.errors import EngineDiedError
from penstock_rollout.engine.sglang.server import StartedServer


@dataclass(frozen=True)
class Bench:
    """An engine and a queue that are up. log: the engine's."""

    engine: StartedServer
    queue: EmbeddedServer
    log: Path

    @property
    def keys(self) -> dict[str, str]:
        """What a run's configuration needs to use them, but for the queue's password."""
        return {"rollout.engine.url": self.engine.url, "redis.url": self.queue.url}

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a launcher that uses them. Engine and services share the cores, so no thread spins."""
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        return {**os.environ, **threads, "PENSTOCK_REDIS__PASSWORD": self.queue.password}

    def cpu_seconds(self) -> float:
        """What the engine's processes have used since their start; EngineDiedError if it is not up."""
        try:
            first = psutil.Process(self.engine.pid)
        except psutil.NoSuchProcess:
            raise EngineDiedError(
                f"the engine of these runs has ended; expected it to outlive them: {self.log}"
            ) from None
        used = 0.0
        for process in (first, *first.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return used


@contextlib.asynccontextmanager
async def running_bench(config: Config, folder: Path) -> AsyncIterator[Bench]:
    """Both, for runs whose engine is configured like that of `config`. `folder`: for their files; it exists."""
    log = folder / "engine.log"
    engine = StartedServer(config.rollout.engine, config.actor.path, log)
    with EmbeddedServer(folder / "queue") as queue:
        await engine.start()
        try:
            yield Bench(engine, queue, log)
        finally:
            await engine.stop()

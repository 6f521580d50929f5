"""Worker processes for episodes: one for each that runs, kept warm for the next.

Owns all processes of the service's environments. Invariants: at most `agent.sessions` exist; no process outlives the
pool; an episode that was cancelled, or failed, leaves no process.

Backpressure: an episode waits until one of `agent.sessions` places is free.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from penstock.config import AgentSection
from penstock.errors import ConfigError
from penstock.workers.guard import GroupGuard
from penstock_agent.environments.worker import BrokenEpisodeError, EnvironmentWorker, start_worker

log = logging.getLogger(__name__)


class WorkerPool:
    """Gives each episode a worker process. Made by `open_pool`."""

    def __init__(self, section: AgentSection, guard: GroupGuard) -> None:
        self._section = section
        self._guard = guard
        self._places = asyncio.Semaphore(section.sessions)
        # Imports are work for a CPU: if all began at once, none would end within its deadline.
        self._starts = asyncio.Semaphore(os.cpu_count() or 1)
        self._idle: list[EnvironmentWorker] = []

    @asynccontextmanager
    async def worker(self, episode: str) -> AsyncIterator[EnvironmentWorker]:
        """A worker for one episode. BrokenEpisodeError if none can be started.

        The worker is kept if the episode ends in order, and killed if it is cancelled or fails.
        """
        async with self._places:
            worker = await self._take()
            try:
                worker.name_output(episode)
                try:
                    yield worker
                except BrokenEpisodeError:
                    await self._finish(worker, episode)
                    raise
                await self._finish(worker, episode)
                worker.name_output("")
                if worker.reusable:
                    self._idle.append(worker)
            finally:
                if worker not in self._idle:
                    await worker.close()

    async def _take(self) -> EnvironmentWorker:
        """An idle worker, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            try:
                await worker.finish()  # nothing is left to do: its answer shows that the process lives
            except BrokenEpisodeError as error:
                log.warning("environment worker %d was lost while idle: %s", worker.pid, error)
                await worker.close()
            except BaseException:
                await worker.close()
                raise
            else:
                return worker
        async with self._starts:
            try:
                return await start_worker(self._section, self._guard)
            except ConfigError as error:  # it could be loaded when the service started
                raise BrokenEpisodeError(str(error)) from None

    async def _finish(self, worker: EnvironmentWorker, episode: str) -> None:
        """Let the environment close, as far as its process lives; the episode's score stands whatever happens."""
        if not worker.usable:
            return
        try:
            await worker.finish()
        except BrokenEpisodeError as error:
            log.warning("environment of %s: %s", episode, error)

    async def close(self) -> None:
        """Kill the idle workers; those of episodes end with their episodes."""
        while self._idle:
            await self._idle.pop().close()


@asynccontextmanager
async def open_pool(section: AgentSection, guard: GroupGuard) -> AsyncIterator[WorkerPool]:
    """A pool without processes; the first episodes start them."""
    pool = WorkerPool(section, guard)
    try:
        yield pool
    finally:
        await pool.close()

"""The engine as the service sees it: a server and its client, kept alive.

Invariant: while `up` is set, the client is connected to the server of the present `life`. Code that meets a broken
engine calls `report`; only the loop `keep_engine` starts and stops servers.

    start -> connect -> up ... died | reported -> down -> stop -> start ...
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Any, Protocol

from penstock.config.secrets import shown_url
from penstock.contracts.weight_sources import GroupRequest
from penstock.errors import EngineDiedError, EngineStartError, TransientStartError
from penstock_rollout.engine.interface import EngineClient, EngineServer

log = logging.getLogger(__name__)

MIN_LIFE_SECONDS = 30.0  # a server that ends sooner, several times in a row, will not live
MAX_EARLY_DEATHS = 5
# The memory of a GPU is free some seconds after the process that had it has ended; a port is free at once.
FIRST_WAIT_SECONDS = 2.0
WAIT_FACTOR = 3.0


class Gate(Protocol):
    """Holds starts back."""

    @property
    def is_closed(self) -> bool: ...

    async def passed(self) -> None:
        """Return when a server may start."""


class Engine:
    """One server that is started again when it dies. Each start begins a new life, counted from 1."""

    def __init__(
        self, server: EngineServer, client: EngineClient, *, start_attempts: int = 1, gate: Gate | None = None
    ) -> None:
        """`start_attempts`: starts in a row that may fail. `gate`: each start passes it, when no server is left."""
        self.client = client
        self.life = 0
        self.group = ""  # the process group of a trainer that the server has joined in this life
        self.up = asyncio.Event()
        self._server = server
        self._start_attempts = start_attempts
        self._gate = gate
        self._broken = asyncio.Event()
        self._reason = ""
        self._early_deaths = 0

    @property
    def name(self) -> str:
        """Name and version, as the server reports them; empty while there is none."""
        return self.client.info.name if self.up.is_set() else ""

    @property
    def device(self) -> str:
        """The device of the server; empty while there is none."""
        return self.client.info.device if self.up.is_set() else ""

    @property
    def num_ranks(self) -> int:
        """Number of processes that share its model; 0 while there is none."""
        return self.client.info.num_ranks if self.up.is_set() else 0

    @property
    def held_back(self) -> bool:
        """Whether there is no server because the gate holds its start back."""
        return self._gate is not None and self._gate.is_closed

    @property
    def not_ready(self) -> str | None:
        """Why there is no server now; None if there is one."""
        if self.up.is_set():
            return None
        if self.held_back:
            return "the engine is to be started, and waits until the trainer has left the GPU"
        return f"the engine is being started again: {self._reason}" if self._reason else "the engine is being started"

    def report(self, life: int, reason: str) -> None:
        """Give up the server of `life`; a report about an earlier life is ignored."""
        if life == self.life and self.up.is_set():
            self.up.clear()
            self._reason = reason
            self._broken.set()

    async def keep_engine(self, stop: asyncio.Event, started: Callable[[], None]) -> None:
        """Start the server, and again whenever it dies or is reported, until `stop`. EngineStartError ends it.

        A start that fails for a reason that may pass is tried again, on another port if that is free to choose.
        `started` is called at each start, before anything can use the server: it has no known weights.
        """
        async with asyncio.TaskGroup() as tasks:
            stopping = tasks.create_task(stop.wait())
            try:
                while not stop.is_set():
                    starting = tasks.create_task(self._start(started))
                    await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
                    if not starting.done():
                        starting.cancel()
                        break
                    await self._until_broken(tasks, stopping)
            finally:
                stopping.cancel()

    async def _start(self, started: Callable[[], None]) -> None:
        wait_seconds = FIRST_WAIT_SECONDS
        for attempt in itertools.count(1):
            if self._gate is not None:
                await self._server.stop()  # the one before still has its memory
                await self._gate.passed()
            try:
                await self._server.start()
                info = await self.client.connect(self._server.url)
                break
            except (TransientStartError, EngineDiedError) as error:
                if attempt >= self._start_attempts:
                    raise EngineStartError(
                        f"the engine did not start, {attempt} times in a row (rollout.engine.start_attempts); "
                        f"the last time: {error}"
                    ) from None
                lines = str(error).splitlines()
                self._reason = " ".join(dict.fromkeys((lines[0], lines[-1])))
                left = f"start {attempt} of {self._start_attempts}, the next one in {wait_seconds:g} s"
                log.warning("the engine did not start (%s): %s", left, error)
            await asyncio.sleep(wait_seconds)
            wait_seconds *= WAIT_FACTOR
        self.life += 1
        self.group = ""
        self._broken.clear()
        started()
        self.up.set()
        url = shown_url(self._server.url)
        log.info("engine ready: %s at %s", info.name, url, extra={"context_length": info.context_length})

    async def _until_broken(self, tasks: asyncio.TaskGroup, stopping: asyncio.Task[Any]) -> None:
        """Return when the server has died, was reported, or `stopping` is done; in the first two it is down."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        died, broken = tasks.create_task(self._server.died()), tasks.create_task(self._broken.wait())
        await asyncio.wait({stopping, died, broken}, return_when=asyncio.FIRST_COMPLETED)
        reason = died.result() if died.done() else self._reason
        for task in (died, broken):
            task.cancel()
        if stopping.done():
            return
        self.up.clear()
        self._reason = reason.splitlines()[0] if reason else ""
        log.error("the engine is lost and is started again: %s", reason)
        await self.client.close()  # calls that still wait for an answer fail now
        if loop.time() - began < MIN_LIFE_SECONDS:
            self._count_early_death(reason)
        else:
            self._early_deaths = 0

    def _count_early_death(self, reason: str) -> None:
        self._early_deaths += 1
        if self._early_deaths >= MAX_EARLY_DEATHS:
            raise EngineStartError(
                f"the engine ended {self._early_deaths} times in a row within {MIN_LIFE_SECONDS:g} s of its start: "
                f"{reason}"
            )

    async def join_group(self, request: GroupRequest) -> None:
        """Let the server join a trainer's group, in place of an earlier one; a server that hangs there is restarted."""
        self.require_up()
        life, earlier = self.life, self.group
        self.group = ""
        try:
            if earlier:
                await self.client.loading.leave_group(earlier)
            await self.client.loading.join_group(request)
        except (EngineDiedError, TimeoutError) as error:
            self.report(life, f"it did not join a group of the trainer: {error}")
            raise
        self.group = request.group

    async def close(self) -> None:
        """End the server; safe at any time."""
        self.up.clear()
        await self.client.close()
        await self._server.stop()

    def require_up(self) -> None:
        """EngineDiedError, with the reason, unless there is a server."""
        if (reason := self.not_ready) is not None:
            raise EngineDiedError(f"{reason}; expected a running engine")

"""A host: a process in which many rollout services run, each complete but for its engine.

Owns what a host does until it ends: all its services are started; they end in order when the parent says so, and at
once when the parent is gone. Each has its own connections, heartbeat, port and app, so that queue and trainer see as
many services.
"""

import asyncio
import logging
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn

from benchmarks.scale.engine import LetterEngine
from penstock.config import Config
from penstock.runtime.connections import raise_file_limit
from penstock.runtime.service import Service
from penstock_rollout.__main__ import serve

START_AT_ONCE = 10
END_SECONDS = 60.0
TICK_SECONDS = 1.0


@dataclass(frozen=True)
class HostPlan:
    """Of one host. `mean_seconds`: of a completion."""

    name: str
    config: Config
    num_services: int
    mean_seconds: float
    log_path: Path


class Host:
    """One host as its parent sees it."""

    def __init__(self, plan: HostPlan) -> None:
        self.plan = plan
        context = multiprocessing.get_context("forkserver")  # hosts share the memory of what they import
        context.set_forkserver_preload([__name__])
        self._own, other = context.Pipe()
        self._process = context.Process(target=_run, args=(plan, other), daemon=True)
        self._process.start()
        other.close()

    @property
    def failed(self) -> bool:
        """Whether it has ended by itself."""
        return self._process.exitcode not in (None, 0)

    def wait_started(self) -> None:
        """Return once all its services have begun to look for work. EOFError: it has ended."""
        self._own.recv()

    def stop(self) -> None:
        """Let its services end in order; they give back what they hold."""
        self._own.send("stop")
        self._process.join(END_SECONDS)
        self.kill()

    def kill(self) -> None:
        """SIGKILL: its services give nothing back, and send no heartbeat any more."""
        self._process.kill()
        self._process.join()


class HostedService(Service):
    """A service among many in one process: its HTTP server looks for its end once a second, not ten times."""

    async def _serve(self, server: uvicorn.Server) -> None:
        async def main_loop() -> None:
            while not await server.on_tick(0):  # noqa: ASYNC110 - uvicorn has a flag, no event
                await asyncio.sleep(TICK_SECONDS)

        server.main_loop = main_loop  # type: ignore[method-assign]
        await super()._serve(server)


def _run(plan: HostPlan, pipe: Connection) -> None:
    raise_file_limit()
    logging.basicConfig(filename=plan.log_path, level=logging.WARNING, format="%(asctime)s %(message)s")
    try:
        asyncio.run(_until_stopped(plan, pipe))
    except Exception:
        logging.exception("the host ends")
        sys.exit(1)


async def _until_stopped(plan: HostPlan, pipe: Connection) -> None:
    """The parent's word is awaited by the loop: a thread that reads it would keep a host alive whose service failed.

    Its end of the pipe is closed when it is gone. The fork server is no sign: it lives as long as any host does.
    """
    heard = asyncio.Event()

    def hear() -> None:
        asyncio.get_running_loop().remove_reader(pipe.fileno())
        try:
            pipe.recv()
        except EOFError:
            os._exit(1)  # not in order: the queue is gone too
        heard.set()

    asyncio.get_running_loop().add_reader(pipe.fileno(), hear)
    await _work(plan, pipe, heard)


async def _work(plan: HostPlan, pipe: Connection, stop: asyncio.Event) -> None:
    starting = asyncio.Semaphore(START_AT_ONCE)
    served = [HostedService("127.0.0.1", 0, "rollout.port") for _ in range(plan.num_services)]
    engines = [LetterEngine(plan.mean_seconds) for _ in served]

    async def one(service: HostedService, engine: LetterEngine) -> None:
        async with starting:
            task = asyncio.create_task(serve(plan.config, service, lambda *_: (engine, engine)))
            began = asyncio.create_task(engine.began.wait())
            await asyncio.wait({task, began}, return_when=asyncio.FIRST_COMPLETED)
            began.cancel()
        await task

    async with asyncio.TaskGroup() as tasks:
        for service, engine in zip(served, engines, strict=True):
            tasks.create_task(one(service, engine))
        for engine in engines:
            await engine.began.wait()
        pipe.send("started")
        await stop.wait()
        for service in served:
            service.stop.set()

"""The rollout service as a process, with a real queue, at the URL of an engine that runs already.

Owns both processes and the trainer's end of the queue: weights that are announced, tickets in, groups out.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import yaml

from benchmarks.push_setup import ModelSource
from benchmarks.tickets import make_ticket, next_group
from penstock.broker import Queue, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import RolloutGroup, Sampling, ServerState, pack_int32
from penstock.contracts.services import Announcement
from penstock_trainer.weights.files import published_format
from penstock_trainer.weights.staging import Staging

STOP_SECONDS = 30
READY_SECONDS = 120.0
GROUP_SECONDS = 300.0  # until the next group: all of them run at once


@dataclass
class Service:
    """A running service; `pids`: of its process and the queue's."""

    pids: dict[str, int]
    trainer: TrainerQueue
    worker: Worker
    announcement: Announcement
    numbers: Iterator[int] = field(default_factory=count)

    async def generate(
        self, prompts: Sequence[Sequence[int]], group_size: int, sampling: Sampling
    ) -> list[RolloutGroup]:
        """One group of each prompt, in the order in which they end."""
        tickets = []
        for prompt, number in zip(prompts, self.numbers, strict=False):
            seeds = range(group_size * number, group_size * (number + 1))
            tickets.append(make_ticket(number, seeds, sampling, prompt_ids=pack_int32(prompt)))
        await self.trainer.issue(tickets, self.announcement)
        return [await next_group(self.worker, GROUP_SECONDS) for _ in tickets]


@asynccontextmanager
async def running_service(
    config: Config, source: ModelSource, url: str, folder: Path, logs: Path
) -> AsyncIterator[Service]:
    """The service with the engine at `url`, its queue, and the model's weights as version 0."""
    staged = Staging(source, folder / "weights", published_format(config))
    log = logs / "rollout-service.log"
    with EmbeddedServer(folder / "queue") as server:
        assert server.process is not None
        engine = config.rollout.engine.model_copy(update={"url": url})
        changes = {"redis": server.section(), "rollout": config.rollout.model_copy(update={"engine": engine})}
        config = config.model_copy(update=changes)
        queue = await connect(config)
        lease = await acquire_lease(queue, config)
        lease.start_renewing(print)
        try:
            identity = await asyncio.to_thread(staged.write, 0, lease.number)
            announcement = Announcement(identity, str(staged.folder_of(0, lease.number)), lease.number)
            with _process(config, folder / "service.yaml", log) as process:
                await _until_ready(queue, process, log)
                pids = {"service": process.pid, "queue": server.process.pid}
                worker = Worker(queue, "reward", config.staleness)
                yield Service(pids, TrainerQueue(queue, lease), worker, announcement)
        finally:
            await asyncio.to_thread(lease.release)
            await queue.close()


@contextmanager
def _process(config: Config, path: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The service; its configuration in `path`, which only this user can read."""
    document = config.model_dump(mode="json", exclude_unset=True)
    password = config.redis.password
    document["redis"] = {"url": config.redis.url, "password": password and password.get_secret_value()}
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "penstock_rollout", "--config", str(path)]
    with log.open("ab") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


async def _until_ready(queue: Queue, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until the service has registered with a connected engine."""
    async with asyncio.timeout(READY_SECONDS):
        while not any(record.server_state not in (None, ServerState.STARTING) for record in await queue.services()):
            if process.poll() is not None:
                raise RuntimeError(f"the rollout service ended with {process.returncode}: see {log}")
            await asyncio.sleep(0.1)

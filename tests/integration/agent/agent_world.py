"""A run with agents without a trainer: real agent and rollout services as processes, a real queue, fake engines.

Owns the folder of the run, its processes, and what a test reads from the queue in the trainer's place.
"""

import asyncio
import contextlib
import os
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from penstock.broker import Queue, Stage, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import (
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    ServiceKind,
    Ticket,
    decode,
)
from penstock.contracts.services import Announcement, ServiceRecord
from penstock.contracts.stored_groups import Part, RolloutHeader, group_of
from tests.patience import ANSWER_SECONDS, START_SECONDS
from tests.unit.rollout.test_fake_engine import FakeSGLang, serving, stage_weights

ENVIRONMENTS = '''
"""Environments of the tests. Each episode that begins adds a line to the file `begun`."""

import math
import os
import pathlib
import time


def begin():
    """The number of this episode among all that began in the run's folder."""
    number = 0
    while True:
        try:
            os.close(os.open(f"begun{number}", os.O_CREAT | os.O_EXCL))
            return number
        except FileExistsError:
            number += 1


class Count:
    """Three turns; the row says what becomes of the last one."""

    def reset(self, free: int = 10**6, fails: str = "", score: str = "turns", **row):
        self.number, self.left = begin(), 3
        self.free, self.fails, self.score = free, fails, score
        return "go="

    def step(self, text: str):
        self.left -= 1
        if self.left:
            return "+="
        while self.number >= self.free and not pathlib.Path("gate").exists():
            time.sleep(0.01)
        if self.fails == "always" or (self.fails and not pathlib.Path(self.fails).exists()):
            raise RuntimeError("the sandbox is away")
        return {"turns": 3.0, "nan": math.nan, "none": None, "text": "good"}[self.score]
'''


class Run:
    """The processes of one run, and its queue."""

    def __init__(self, folder: Path, document: dict[str, Any], queue: Queue, trainer: TrainerQueue) -> None:
        self.folder = folder
        self.document = document
        self.queue = queue
        self.trainer = trainer
        self._worker = Worker(queue, "reward", slow(document).staleness)
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._announced: Announcement | None = None

    async def start(self, kind: str, name: str, **engine: Any) -> asyncio.subprocess.Process:
        """Start a service; `name`: of its log."""
        document = {**self.document}
        document["rollout"] = {"engine": {**document["rollout"]["engine"], **engine}}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", f"penstock_{kind}", "--config", str(path)),
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
            )
        self._processes[name] = process
        return process

    async def start_engines(self, *urls: str) -> None:
        """A rollout service for each engine, with version 0 announced to it."""
        for number, url in enumerate(urls):
            await self.start("rollout", f"rollout{number}", url=url)
        records = await self.records(ServiceKind.ROLLOUT, len(urls))
        path, digest = stage_weights(self.folder, 0)
        lease = self.trainer.lease.number
        for record in records:
            async with httpx.AsyncClient(base_url=record.url, timeout=ANSWER_SECONDS) as http:
                body = {"path": path, "digest": digest, "lease": lease}
                (await http.put("/v1/weights/0", json=body)).raise_for_status()
        self._announced = Announcement(PolicyIdentity(0, digest), path, lease)

    async def issue(self, *tickets: Ticket) -> None:
        training = [each for each in tickets if each.purpose == "train"]
        await self.trainer.issue(training, self._announced)
        await self.trainer.issue_eval([each for each in tickets if each.purpose == "eval"])

    def ticket(self, number: int, **fields: Any) -> Ticket:
        group_size = fields.pop("group_size", 2)
        metadata = {"prompt": "q=", **fields.pop("metadata", {})}
        return Ticket(
            **{
                "purpose": "train",
                "number": number,
                "attempt": 0,
                "policy_version": 0,
                "prompt": "q=",
                "prompt_ids": b"",
                "seeds": tuple(range(10 * number, 10 * number + group_size)),
                "sampling": Sampling(1.0, 4, ()),
                "answer": "7",
                "reward": "",
                "metadata": metadata,
                "environment": self.document["agent"].get("environment") or " ".join(self.document["agent"]["command"]),
                **fields,
            }
        )

    async def records(
        self, kind: ServiceKind, number: int, ready: Callable[[str], bool] = lambda state: True
    ) -> list[ServiceRecord]:
        """The records of so many services of a kind whose states are as wanted."""

        async def found() -> list[ServiceRecord] | None:
            records = [each for each in await self.queue.services() if each.kind is kind]
            starting = [each for each in records if each.state == "starting"]
            return (
                records
                if len(records) == number and not starting and all(ready(each.state) for each in records)
                else None
            )

        records: list[ServiceRecord] = await self.until(found, f"{number} {kind} services")
        return records

    async def until(self, found: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> Any:
        """The first answer that is not None; the logs if there is none in time."""
        try:
            async with asyncio.timeout(seconds):
                while (answer := await found()) is None:
                    for name, process in self._processes.items():
                        assert process.returncode in (None, 0, -9, -15), f"{name} ended:\n{self.logs()}"
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"no {what} within {seconds:g} s:\n{self.logs()}") from None
        return answer

    async def group(self) -> RolloutGroup:
        """The next group that is handed over, as the reward service and then the trainer get it."""

        async def taken() -> RolloutGroup | None:
            delivery = await self._worker.take(Stage.ROLLOUTS)
            if delivery is None:
                return None
            [parts] = await self._worker.read([delivery], *Part)
            header = decode(delivery.payload, RolloutHeader)
            group = group_of(header, parts)
            assert header.environment_scores == tuple(episode.score for episode in group.episodes)
            return group

        found = await self.until(taken, "group")
        assert isinstance(found, RolloutGroup)
        return found

    async def groups(self, number: int) -> dict[str, RolloutGroup]:
        return {group.ticket.key: group for group in [await self.group() for _ in range(number)]}

    @property
    def num_begun(self) -> int:
        """Attempts at episodes that any service has begun."""
        return len(list(self.folder.glob("begun*")))

    async def until_begun(self, number: int) -> None:
        async def enough() -> bool | None:
            return self.num_begun >= number or None

        await self.until(enough, f"{number} episodes that began")

    async def until_kept(self, number: int) -> None:
        """Until so many finished episodes are kept beside their tickets."""

        async def enough() -> bool | None:
            pattern = self.queue.keys.name("episodes:*")
            keys = [key async for key in self.queue.client.scan_iter(match=pattern, count=500)]
            return sum([await self.queue.guard(self.queue.client.hlen(key)) for key in keys]) == number or None

        await self.until(enough, f"{number} episodes that are kept")

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in self.folder.glob("*.log")
        )

    async def kill_one(self, name: str) -> None:
        """As kill -9 does."""
        self._processes[name].kill()
        await self._processes[name].wait()

    async def kill(self) -> None:
        for process in self._processes.values():
            if process.returncode is None:
                process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def running(folder: Path, model: Path, server: EmbeddedServer, **agent: Any) -> AsyncIterator[Run]:
    """A run without processes so far. agent: keys of that section."""
    (folder / "envs.py").write_text(ENVIRONMENTS)
    document: dict[str, Any] = {
        "run": {"name": f"agents-{uuid.uuid4().hex[:12]}", "root": str(folder / "runs")},
        "actor": {"path": str(model), "group_size": 2},
        "sampling": {"max_new_tokens": 4},
        "data": {"train": {"path": "unused"}},
        "staleness": {"heartbeat_seconds": 2, "claim_idle_seconds": 20},
        "rollout": {"engine": {"start_timeout_seconds": START_SECONDS}},
        "weights": {"canary_tokens": 0},  # the engine is a fake, which does not compute the model
        "agent": {"environment": "envs:Count", "template": "plain", "max_tokens": 50, **agent},
        "redis": {"url": server.url, "password": server.password, "timeout_seconds": ANSWER_SECONDS},
    }
    if agent.get("command"):
        document["agent"]["environment"] = ""
    queue = await connect(slow(document))
    run: Run | None = None
    try:
        trainer = TrainerQueue(queue, await acquire_lease(queue, slow(document)))
        run = Run(folder, document, queue, trainer)
        yield run
    finally:
        if run is not None:
            await run.kill()
        async with asyncio.timeout(ANSWER_SECONDS):
            await queue.delete_run()
            await queue.close()


def slow(document: dict[str, Any]) -> Config:
    """The configuration of the test's own side, of which nothing expires."""
    never = {"heartbeat_seconds": 3600, "claim_idle_seconds": 3600}
    return Config.model_validate({**document, "staleness": never})


@contextlib.asynccontextmanager
async def fake_engines(number: int) -> AsyncIterator[tuple[list[FakeSGLang], list[str]]]:
    """Engines, and their URLs."""
    fakes = [FakeSGLang() for _ in range(number)]
    async with contextlib.AsyncExitStack() as stack:
        yield fakes, [await stack.enter_async_context(serving(fake)) for fake in fakes]

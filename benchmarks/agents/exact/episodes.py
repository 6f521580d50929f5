"""Groups of episodes: a real agent service, queue and rollout service, and new weights while episodes run.

Owns the trainer's side of one case, and the agent service's process. Invariant: of each version that is announced, it
is known which model's weights were pushed as it.
"""

import asyncio
import os
import sys
import time
import uuid
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml

from benchmarks.agents.exact.cases import MAX_TOKENS, ROOT, Case
from benchmarks.push_setup import ModelSource, Pusher, RolloutServer, pusher
from benchmarks.tickets import next_group
from penstock.broker import Queue, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import PolicyIdentity, RolloutGroup, Sampling, Ticket
from penstock.contracts.services import Announcement
from penstock_trainer.weight_sync.canary import CanaryMaker

CANARY_IDS = tuple(range(40, 56))
RECORD_SECONDS = 10.0  # a service's record lives so long
END_SECONDS = 30.0
NEVER = {"heartbeat_seconds": 3600, "claim_idle_seconds": 3600}  # on this side, nothing expires by itself


@dataclass(frozen=True)
class Setting:
    """What all cases share.

    tokenizer: a folder, for the agent service. models: whose weights are pushed, in turn. sessions: of the agent
    service. wait_seconds: for one group, before it is given up (RuntimeError).
    """

    folder: Path
    tokenizer: Path
    models: tuple[Any, ...]
    server: RolloutServer
    redis: EmbeddedServer
    group_size: int
    sessions: int
    wait_seconds: float
    temperature: float = 1.0


@dataclass
class Made:
    """The groups of a case, and the models of its versions: their numbers in `Setting.models`."""

    case: Case
    groups: list[RolloutGroup] = field(default_factory=list)
    models: dict[PolicyIdentity, int] = field(default_factory=dict)
    seconds: float = 0.0


async def make_groups(setting: Setting, case: Case, num_groups: int, pushes_after: Collection[int]) -> Made:
    """The groups of a case. pushes_after: numbers of groups after which other weights are pushed, while others run."""
    made = Made(case)
    async with _running(setting, case) as run:
        await run.push(made)
        began = time.monotonic()
        await run.issue(case.rows(num_groups))
        while len(made.groups) < num_groups:
            made.groups.append(await run.group())
            if len(made.groups) in pushes_after:
                await run.push(made)
        made.seconds = time.monotonic() - began
    return made


@dataclass
class _Run:
    """One case. source: what `pushing` stages."""

    setting: Setting
    case: Case
    config: Config
    queue: Queue
    trainer: TrainerQueue
    pushing: Pusher
    source: ModelSource
    worker: Worker
    announced: Announcement | None = None

    @property
    def log(self) -> Path:
        """Of the agent service."""
        return self.setting.folder / f"agent-{self.config.run.name}.log"

    async def push(self, made: Made) -> None:
        """Make, push and announce the next version, as the trainer does."""
        number = self.pushing.version % len(self.setting.models)
        model = self.source.model = self.setting.models[number]
        staged = await self.pushing.stage()
        canary = CanaryMaker(lambda ids: _logprobs(model, ids), CANARY_IDS, self.config)
        with_canary = await asyncio.to_thread(canary.make, staged.identity.number)
        self.announced = msgspec.structs.replace(staged, canary=with_canary)
        made.models[staged.identity] = number
        push = await self.pushing.publisher.push(self.announced)
        if push.fenced or not push.live:
            raise RuntimeError(f"{staged.identity} was not taken: {push.fenced or 'no server is registered'}")
        await self.trainer.issue([], self.announced)

    async def issue(self, rows: Sequence[dict[str, Any]]) -> None:
        """A ticket for each row."""
        assert self.announced is not None
        sampling = Sampling(self.setting.temperature, self.case.max_new_tokens, self.case.stop_token_ids)
        tickets = [
            Ticket(
                purpose="train",
                number=number,
                attempt=0,
                policy_version=self.announced.identity.number,
                prompt=str(row.get("prompt", "")),
                prompt_ids=b"",
                seeds=tuple(number * self.setting.group_size + each for each in range(self.setting.group_size)),
                sampling=sampling,
                answer=row["answer"],
                reward="",
                metadata={key: value for key, value in row.items() if key != "answer"},
                environment=self.config.agent.name,
            )
            for number, row in enumerate(rows)
        ]
        await self.trainer.issue(tickets)

    async def group(self) -> RolloutGroup:
        """The next group that is handed over."""
        seconds = self.setting.wait_seconds
        try:
            return await next_group(self.worker, seconds)
        except TimeoutError:
            raise RuntimeError(f"no group in {seconds:g} s; the service's log is {self.log}") from None

    async def keep_registered(self) -> None:
        """Show the rollout service to the agents', in place of its own process."""
        while True:
            await self.queue.register(self.setting.server.record, RECORD_SECONDS)
            await asyncio.sleep(RECORD_SECONDS / 10)


@asynccontextmanager
async def _running(setting: Setting, case: Case) -> AsyncIterator[_Run]:
    document = _document(setting, case)
    config = Config.model_validate({**document, "staleness": NEVER})
    queue = await connect(config)
    try:
        lease = await acquire_lease(queue, config, above=setting.server.weights.lease)
        source = ModelSource(setting.models[0])
        async with pusher(config, source, [setting.server], setting.folder, lease=lease.number) as pushing:
            trainer, worker = TrainerQueue(queue, lease), Worker(queue, "reward", config.staleness)
            run = _Run(setting, case, config, queue, trainer, pushing, source, worker)
            async with _agent_service(run, document):
                registering = asyncio.create_task(run.keep_registered())
                try:
                    yield run
                finally:
                    registering.cancel()
                    with suppress(asyncio.CancelledError):
                        await registering
    finally:
        await queue.delete_run()
        await queue.close()


@asynccontextmanager
async def _agent_service(run: _Run, document: dict[str, Any]) -> AsyncIterator[None]:
    path = run.log.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(document))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with run.log.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "penstock_agent", "--config", str(path)),
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(END_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def _document(setting: Setting, case: Case) -> dict[str, Any]:
    return {
        "run": {"name": f"exact-{uuid.uuid4().hex[:12]}", "root": str(setting.folder / "runs")},
        "actor": {"path": str(setting.tokenizer), "group_size": setting.group_size, "dtype": "float32"},
        "sampling": {"temperature": setting.temperature, "max_new_tokens": case.max_new_tokens},
        "data": {"train": {"path": "unused"}},
        "staleness": {"heartbeat_seconds": 5, "claim_idle_seconds": 300},
        "rollout": {"engine": {"dtype": "float32", "max_running_requests": setting.sessions}},
        "weights": {"transport": "disk", "folder": str(setting.folder / "weights")},
        "agent": {"max_tokens": MAX_TOKENS, "sessions": setting.sessions, **case.agent},
        "redis": {"url": setting.redis.url, "password": setting.redis.password},
    }


def _logprobs(model: Any, token_ids: Sequence[int]) -> tuple[float, ...]:
    """Of all tokens but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1]
    said = torch.log_softmax(logits, -1).gather(1, torch.tensor(token_ids[1:])[:, None])
    return tuple(said[:, 0].tolist())

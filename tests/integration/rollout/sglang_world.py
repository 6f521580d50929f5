"""Real SGLang servers behind the rollout service's own parts, and the log-probabilities of their real weights."""

import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from penstock.config import Config
from penstock.contracts import Completion, Sampling, Ticket, pack_int32, unpack_int32
from penstock.contracts.canary import Canary
from penstock.contracts.services import Announcement
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.engine.sglang.generation import SGLangGeneration
from penstock_rollout.engine.sglang.server import make_server
from penstock_rollout.engine.types import CompletionRequest, GroupAnswer
from penstock_rollout.generator import Generator
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.producer import Producer
from penstock_rollout.weights.updater import WeightUpdater
from tests.integration.rollout.sglang_pair import ROOT
from tests.integration.rollout.test_engine_sglang import stage
from tests.patience import START_SECONDS
from tests.tolerance import logprob_tolerance
from tests.unit.rollout.one_request import generate
from tests.unit.rollout.producer_setup import MemoryQueue, as_it_is

CANARY_TOKENS = tuple(range(40, 56))
SHARED_PROMPT = tuple(range(60, 160))  # long enough that a stale prefix would show
LONG_TOKENS = 2400  # takes many times as long as two pushes on an idle machine
RUN_SECONDS = 0.5  # long enough to sample some of them, on a busy machine too
TEMPERATURE = 0.3  # low, so that none ends early


class Oracle:
    """Computes log-probabilities from weights, in a process of its own (`weights_oracle`)."""

    def __init__(self) -> None:
        self._process = child([sys.executable, str(Path(__file__).with_name("weights_oracle.py"))])

    def logprobs(self, requests: Sequence[dict[str, Any]]) -> list[list[float]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(requests, default=list), file=self._process.stdin, flush=True)
        answer: list[list[float]] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        end(self._process)


def child(command: list[str]) -> "subprocess.Popen[str]":
    paths = os.pathsep.join(str(ROOT / part) for part in ("common", "services/rollout"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def end(process: "subprocess.Popen[str]") -> None:
    """End the process by closing its standard input."""
    with process:
        assert process.stdin is not None
        process.stdin.close()


class SpanlessGeneration(SGLangGeneration):
    """An engine that reports one version per answer, like SGLang before 0.5.19."""

    async def complete(self, requests: Sequence[CompletionRequest], sampling: Sampling) -> GroupAnswer:
        return tuple(replace(each, spans=()) for each in await super().complete(requests, sampling))


@dataclass
class Server:
    """One rollout service without its HTTP and queue."""

    client: SGLangClient
    engine: Engine
    weights: WeightUpdater
    metrics: RolloutMetrics
    queue: MemoryQueue = field(default_factory=MemoryQueue)

    async def generates(self) -> None:
        """Return once its group runs, or has ended: on a busy machine a push may take longer."""
        async with asyncio.timeout(START_SECONDS):
            while not self._runs and not self.queue.published:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    @property
    def _runs(self) -> bool:
        return bool(self.metrics.registry.get_sample_value("penstock_rollout_inflight_groups"))

    async def group(self, prompt: Sequence[int], max_new_tokens: int) -> tuple[Completion, ...]:
        """The completions of a ticket, as they are handed over."""
        ticket = Ticket(
            purpose="train",
            number=0,
            attempt=0,
            policy_version=0,
            prompt="",
            prompt_ids=pack_int32(prompt),
            seeds=(1, 2),
            sampling=Sampling(TEMPERATURE, max_new_tokens, ()),
            answer="",
            reward="",
            metadata={},
        )
        self.queue.published.clear()
        self.queue.put(ticket)
        async with asyncio.timeout(START_SECONDS):
            while not self.queue.published:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return self.queue.published[0].completions


@dataclass
class World:
    servers: list[Server]
    models: tuple[Path, ...]
    oracle: Oracle
    lease: int
    tolerance: float
    """Between two right computations of the longest sequence here."""
    version: int = 0

    def canary(self, model: int) -> Canary:
        runs = [[str(self.models[model]), len(CANARY_TOKENS) - 1]]
        request = {"prompt": CANARY_TOKENS[:1], "tokens": CANARY_TOKENS[1:], "runs": runs, "keep_cache": False}
        return Canary(CANARY_TOKENS, tuple(self.oracle.logprobs([request])[0]), tolerance=self.tolerance)

    def staged(self, model: int) -> Announcement:
        """Stage the next version, with these weights."""
        self.version += 1
        staged = stage(self.models[model], self.version)
        return Announcement(staged.identity, staged.path, self.lease, self.canary(model))

    async def push(self, wanted: Announcement) -> list[BaseException | None]:
        """Push to all servers at once, then announce."""
        results = await asyncio.gather(*(each.weights.update(wanted) for each in self.servers), return_exceptions=True)
        for server in self.servers:
            server.queue.announced = wanted
        return results

    def say(
        self, prompt: Sequence[int], completion: Completion, runs: list[list[Any]], *, keep_cache: bool = False
    ) -> list[float]:
        tokens = unpack_int32(completion.token_ids)
        request: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "runs": runs, "keep_cache": keep_cache}
        request["temperature"] = TEMPERATURE
        return self.oracle.logprobs([request])[0]

    async def check_greedy(self, model: int) -> None:
        """Check that both servers give the weights' log-probabilities, for a cached prompt and for a new one."""
        for prompt in (SHARED_PROMPT, (*SHARED_PROMPT[:50], self.version)):
            engines = [each.engine for each in self.servers]
            greedy = Sampling(0.0, 6, ())
            answers = await asyncio.gather(*(generate(each, pack_int32(prompt), (1, 2), greedy) for each in engines))
            for answer in (each for group in answers for each in group):
                request = {"prompt": prompt, "tokens": answer.token_ids, "runs": [[str(self.models[model]), 6]]}
                (expected,) = self.oracle.logprobs([{**request, "keep_cache": False}])
                assert list(answer.logprobs) == pytest.approx(expected, abs=self.tolerance)


@contextlib.asynccontextmanager
async def serving(url: str, folder: Path, mode: str, *, spans: bool = True) -> AsyncIterator[Server]:
    config = Config.model_validate(
        {
            "actor": {"path": "unused", "group_size": 2},
            "data": {"train": {"path": "unused"}},
            "weights": {"pause_mode": mode, "checksums": True},
            "rollout": {"engine": {"url": url, "max_running_requests": 8}},
        }
    )
    section = config.rollout.engine
    client = SGLangClient(section)
    if not spans:
        client.generation = SpanlessGeneration(
            client.connection, section.request_timeout_seconds, skip_special_tokens=True
        )
    engine = Engine(make_server(section, "unused", folder / "log"), client)
    metrics = RolloutMetrics()
    weights = WeightUpdater(engine, config.weights, metrics)
    server = Server(client, engine, weights, metrics)
    stop, engine_stop = asyncio.Event(), asyncio.Event()
    producer = Producer(
        server.queue,
        server.queue.announcement,
        engine,
        weights,
        Generator(engine, weights, metrics),
        as_it_is,
        metrics,
        config,
        "server",
    )
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(engine.keep_engine(engine_stop, weights.forget))
            await engine.up.wait()
            producing = tasks.create_task(producer.produce_groups(stop))
            yield server
            stop.set()
            await producing
            engine_stop.set()
    finally:
        await engine.close()


LEASES = iter(range(1, 100))


@contextlib.asynccontextmanager
async def world(
    urls: list[str], models: tuple[Path, ...], oracle: Oracle, folder: Path, mode: str
) -> AsyncIterator[World]:
    """In mode abort the second server reports no spans."""
    async with contextlib.AsyncExitStack() as stack:
        servers = [
            await stack.enter_async_context(serving(url, folder, mode, spans=mode != "abort" or number == 0))
            for number, url in enumerate(urls)
        ]
        tolerance = max(map(tolerance_of, models))
        yield World(servers, models, oracle, next(LEASES), tolerance)


@functools.cache
def tolerance_of(model: Path) -> float:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return logprob_tolerance(loaded, len(SHARED_PROMPT) + LONG_TOKENS)

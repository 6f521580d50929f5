"""A WeightUpdater over a fake engine, for the tests of updates, canaries and pushes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import SecretStr

from penstock.config import EngineSection, WeightsSection
from penstock.contracts import PolicyIdentity
from penstock.contracts.canary import Canary
from penstock.contracts.services import Announcement
from penstock_rollout.admission import Admission
from penstock_rollout.app import make_rollout_app
from penstock_rollout.calls import Calls
from penstock_rollout.engine.engine import Engine
from penstock_rollout.engine.sglang.client import SGLangClient
from penstock_rollout.generator import Generator
from penstock_rollout.metrics import RolloutMetrics
from penstock_rollout.weights.turns import Turns
from penstock_rollout.weights.updater import WeightUpdater
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.fake_model import prompt_logprobs
from tests.unit.rollout.test_fake_engine import FakeServer, FakeSGLang, serving, stage_weights

MAX_CALLS = 4  # that run; as many may wait
CANARY_TOKENS = (5, 6, 7)
ABORT_CYCLE = ["/pause_generation", "/update_weights_from_disk", "/flush_cache", "/continue_generation"]
CYCLE = ["/pause_generation", "/set_internal_state", *ABORT_CYCLE[1:]]


def calls_of(engine: Engine, weights: WeightUpdater, metrics: RolloutMetrics) -> Calls:
    """The calls of a service that has room for few."""
    return Calls(Generator(engine, weights, metrics), weights, metrics, Admission(MAX_CALLS, MAX_CALLS))


@dataclass
class Rollout:
    """The weights of a rollout service, over a fake engine."""

    fake: FakeSGLang
    server: FakeServer
    engine: Engine
    weights: WeightUpdater
    metrics: RolloutMetrics
    root: Path

    def __post_init__(self) -> None:
        self.calls = calls_of(self.engine, self.weights, self.metrics)

    def app(self, token: SecretStr | None = None, turns: Turns | None = None) -> FastAPI:
        """The service's HTTP side."""
        return make_rollout_app(self.engine, self.weights, self.calls, self.metrics.registry, token, turns)

    def staged(self, version: int, lease: int = 1, content: bytes = b"", canary: Canary | None = None) -> Announcement:
        path, digest = stage_weights(self.root / f"{lease}", version, content)
        return Announcement(PolicyIdentity(version, digest), path, lease, canary)

    def watched(self, version: int) -> Announcement:
        """Stage a version with a canary."""
        return self.staged(
            version, canary=Canary(CANARY_TOKENS, prompt_logprobs(CANARY_TOKENS, f"{version}-"), tolerance=0.01)
        )

    def use(self, **section: Any) -> None:
        """Continue with other settings."""
        self.weights._section = WeightsSection(**section)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"penstock_rollout_{name}", labels)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def updating_rollout(root: Path) -> AsyncIterator[Rollout]:
    """A rollout service whose engine is up and has no weights yet."""
    fake = FakeSGLang()
    async with serving(fake) as url:
        server = FakeServer(fake, url)
        engine = Engine(server, SGLangClient(EngineSection(request_timeout_seconds=ANSWER_SECONDS)))
        metrics = RolloutMetrics()
        weights = WeightUpdater(engine, WeightsSection(), metrics)
        stop = asyncio.Event()
        keeping = asyncio.create_task(engine.keep_engine(stop, weights.forget))
        await engine.up.wait()
        yield Rollout(fake, server, engine, weights, metrics, root)
        stop.set()
        await keeping
        await engine.close()

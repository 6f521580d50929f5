"""A conversation of ids with a real SGLang in float32, while weights change between its turns and during one.

Plain transformers recomputes every log-probability with the weights that the call's spans name.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from benchmarks.push_setup import RolloutServer
from penstock.contracts import PolicyIdentity, Sampling, pack_int32, unpack_float32, unpack_int32
from penstock.contracts.services import ServiceRecord
from penstock_agent.generation.call import Call, Generated
from penstock_agent.generation.servers import Servers
from tests.integration.rollout.sglang_pair import PYTHON
from tests.integration.rollout.sglang_world import (
    LONG_TOKENS,
    RUN_SECONDS,
    SHARED_PROMPT,
    TEMPERATURE,
    Oracle,
    World,
    tolerance_of,
)
from tests.patience import START_SECONDS

OBSERVATION = (7, 8, 9, 10, 11)  # what a tool answers between two turns
TURN_TOKENS = 24
ATTEMPTS = 4  # to call for longer than a push takes: on a busy machine the call may end before it

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]


@dataclass
class Turn:
    """What was sent, and what came back."""

    prompt: tuple[int, ...]
    generated: Generated

    @property
    def versions(self) -> list[int]:
        return [span.policy.number for span in self.generated.spans]


@dataclass
class Conversation:
    """Each turn's prompt is the path so far: prompts, sampled tokens, observations."""

    server: RolloutServer
    servers: Servers
    here: World
    path: tuple[int, ...] = SHARED_PROMPT
    turns: list[Turn] = field(default_factory=list)
    models: dict[PolicyIdentity, Path] = field(default_factory=dict)

    async def push(self, model: int) -> None:
        """The next version, with these weights."""
        wanted = self.here.staged(model)
        self.models[wanted.identity] = self.here.models[model]
        await self.server.weights.update(wanted)

    async def turn(self, num_tokens: int = TURN_TOKENS) -> Turn:
        """A turn by the present version, or a later one."""
        here = self.here
        sampling, seed = Sampling(TEMPERATURE, num_tokens, ()), len(self.turns)
        call = Call(pack_int32(self.path), seed, sampling, "session", here.version, here.lease)
        async with asyncio.timeout(START_SECONDS):
            generated = await self.servers.generate(call)
        self.turns.append(Turn(self.path, generated))
        self.path += (*unpack_int32(generated.token_ids), *OBSERVATION)
        return self.turns[-1]

    async def turn_through_a_push(self, model: int) -> Turn:
        turning, metrics = asyncio.create_task(self.turn(LONG_TOKENS)), f"{self.server.url}/metrics"
        async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(trust_env=False) as http:
            while "rollout_inflight_groups 1.0" not in (await http.get(metrics)).text:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await asyncio.sleep(RUN_SECONDS)
        await self.push(model)
        return await turning

    def check(self, turn: Turn) -> None:
        """Each log-probability is that of the weights that its span names, which computed the whole path anew."""
        generated = turn.generated
        runs = [[str(self.models[span.policy]), span.end] for span in generated.spans]
        tokens = unpack_int32(generated.token_ids)
        request = {"prompt": turn.prompt, "tokens": tokens, "runs": runs, "keep_cache": False}
        (expected,) = self.here.oracle.logprobs([{**request, "temperature": TEMPERATURE}])
        assert unpack_float32(generated.logprobs) == pytest.approx(expected, abs=self.here.tolerance / TEMPERATURE)


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    oracle = Oracle()
    yield oracle
    oracle.close()


@pytest_asyncio.fixture(loop_scope="session")
async def talk(
    sglang_pair: list[RolloutServer], sglang_models: tuple[Path, ...], oracle: Oracle
) -> AsyncIterator[Conversation]:
    server = sglang_pair[0]

    async def services() -> list[ServiceRecord]:
        return [server.record]

    here = World([], sglang_models, oracle, server.weights.lease + 1, max(map(tolerance_of, sglang_models)))
    servers = Servers(services, None, 8, lambda reason: None)
    following = asyncio.create_task(servers.follow())
    yield Conversation(server, servers, here)
    following.cancel()
    await servers.close()


async def test_each_turn_is_by_the_weights_that_its_spans_name(talk: Conversation) -> None:
    await talk.push(0)
    first, second = await talk.turn(), await talk.turn()
    assert (first.versions, second.versions) == ([1], [1])
    # All that the engine computed for the first turn: its last token has not been an input yet.
    assert second.generated.num_cached_tokens == len(first.prompt) + TURN_TOKENS - 1
    await talk.push(1)
    third = await talk.turn()
    assert (third.versions, third.generated.num_cached_tokens) == ([2], 0)  # no prefix of older weights is used
    before = talk.path
    for attempt in range(ATTEMPTS):
        talk.path = before
        fourth = await talk.turn_through_a_push(2 + attempt % 2)
        if len(fourth.versions) == 2:
            break
    assert fourth.versions == [talk.here.version - 1, talk.here.version]
    assert (await talk.turn()).versions == [talk.here.version]
    for turn in talk.turns:
        talk.check(turn)

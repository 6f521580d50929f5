"""Pushes to two real SGLang servers: every pause mode, the version of every token, failed canaries.

Each test gets the servers by their URLs, and compares their answers with plain transformers.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.push_setup import RolloutServer
from penstock.contracts import Completion, unpack_float32
from penstock.contracts.services import Announcement
from penstock.errors import WeightsMismatchError
from penstock_rollout.engine.sglang.checksums import check_checksums
from tests.integration.rollout.sglang_pair import PYTHON
from tests.integration.rollout.sglang_world import (
    LONG_TOKENS,
    RUN_SECONDS,
    SHARED_PROMPT,
    TEMPERATURE,
    Oracle,
    World,
    world,
)
from tests.patience import ANSWER_SECONDS

ATTEMPTS = 4  # to start a group that outlives two pushes: on a busy machine it may end before the second

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    oracle = Oracle()
    yield oracle
    oracle.close()


@pytest.fixture
def urls(sglang_pair: list[RolloutServer]) -> list[str]:
    return [each.server.url for each in sglang_pair]


async def push_twice_into_a_group(
    here: World, pair: list[RolloutServer]
) -> tuple[list[Announcement], list[Completion]]:
    """The three versions, and the completions of a group per server that began under the first."""
    pushed = [here.staged(0)]
    assert await here.push(pushed[0]) == [None, None]
    await here.check_greedy(0)
    running = [asyncio.create_task(each.group(SHARED_PROMPT, LONG_TOKENS)) for each in here.servers]
    for model in (1, 2):
        await asyncio.gather(*(each.generates() for each in here.servers))
        await asyncio.sleep(RUN_SECONDS)
        pushed.append(here.staged(model))
        if model == 2:
            folder = Path(pushed[-1].path)
            await asyncio.gather(*(each.engine.client.loading.prefetch(folder, ANSWER_SECONDS) for each in pair))
        assert await here.push(pushed[-1]) == [None, None]
        await here.check_greedy(model)
    return pushed, [each for group in await asyncio.gather(*running) for each in group]


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
async def test_each_token_is_by_the_weights_that_it_names(
    sglang_pair: list[RolloutServer], sglang_models: tuple[Path, ...], oracle: Oracle, tmp_path: Path, mode: str
) -> None:
    """Of a group that lives through two pushes, of which the second was prefetched.

    After each push both servers give the log-probabilities of the trainer's weights.
    """
    urls = [each.server.url for each in sglang_pair]
    async with world(urls, sglang_models, oracle, tmp_path, mode) as here:
        tolerance = here.tolerance / TEMPERATURE

        def outlived_both(pushed: list[Announcement], completion: Completion) -> bool:
            """Check what it says of each token; whether it names all three versions."""
            named = [span.policy for span in completion.spans]
            assert named == [each.identity for each in pushed][: len(named)]
            assert completion.num_tokens == LONG_TOKENS
            folder_of = {each.identity: str(folder) for each, folder in zip(pushed, sglang_models, strict=False)}
            runs = [[folder_of[span.policy], span.end] for span in completion.spans]
            said = unpack_float32(completion.logprobs)
            expected = here.say(SHARED_PROMPT, completion, runs, keep_cache=mode == "in_place")
            assert said == pytest.approx(expected, abs=tolerance)
            if len(named) < len(pushed):
                return False
            other = here.say(SHARED_PROMPT, completion, runs, keep_cache=mode != "in_place")
            assert said != pytest.approx(other, abs=2 * tolerance)  # it matters which weights computed the cache
            return True

        for _ in range(ATTEMPTS):
            pushed, completions = await push_twice_into_a_group(here, sglang_pair)
            outlived = [outlived_both(pushed, each) for each in completions]
            if all(outlived):
                break
        else:
            raise AssertionError(f"no group outlived two pushes in {ATTEMPTS} attempts")
        await here.check_greedy(2)


async def test_a_server_whose_answers_are_of_other_weights_is_fenced_and_catches_up(
    urls: list[str], sglang_models: tuple[Path, ...], oracle: Oracle, tmp_path: Path
) -> None:
    async with world(urls, sglang_models, oracle, tmp_path, "retract") as here:
        first, second = here.servers
        assert await here.push(here.staged(0)) == [None, None]
        good = here.staged(1)
        bad = Announcement(good.identity, good.path, good.lease, here.canary(3))

        async def refused() -> None:
            with pytest.raises(WeightsMismatchError):
                await first.weights.update(bad)
            # At once, because its producer loads the announced version next.
            assert "log-probabilities of 16 canary tokens" in first.weights.fenced
            assert first.weights.identity is None

        await asyncio.gather(refused(), second.weights.update(good))
        first.queue.announced = second.queue.announced = good
        groups = await asyncio.gather(*(each.group((5, 6, 7), 8) for each in here.servers))
        for completion in (each for group in groups for each in group):
            assert [span.policy for span in completion.spans] == [good.identity]
            said = here.say((5, 6, 7), completion, [[str(sglang_models[1]), 8]])
            assert unpack_float32(completion.logprobs) == pytest.approx(said, abs=here.tolerance / TEMPERATURE)
        assert (first.engine.life, first.weights.fenced) == (2, "")


async def test_an_engine_reports_the_checksums_of_the_files(
    urls: list[str], sglang_models: tuple[Path, ...], oracle: Oracle, tmp_path: Path
) -> None:
    async with world(urls, sglang_models, oracle, tmp_path, "retract") as here:
        assert await here.push(here.staged(0)) == [None, None]
        for server in here.servers:
            reported = await server.client.loading.checksums(ANSWER_SECONDS)
            assert check_checksums(sglang_models[0], reported) == len(reported) >= 9
            with pytest.raises(WeightsMismatchError, match=r"of \d+ tensors with other bytes"):
                check_checksums(sglang_models[1], reported)


async def test_an_engine_that_slept_goes_on_with_the_next_weights(
    urls: list[str], sglang_models: tuple[Path, ...], oracle: Oracle, tmp_path: Path
) -> None:
    """A group that lives through two sleeps. Without a GPU SGLang keeps the memory, and takes all the calls."""
    async with world(urls, sglang_models, oracle, tmp_path, "retract") as here:
        pushed = [here.staged(0)]
        assert await here.push(pushed[0]) == [None, None]
        running = [asyncio.create_task(each.group(SHARED_PROMPT, LONG_TOKENS)) for each in here.servers]
        for model in (1, 2):
            await asyncio.gather(*(each.generates() for each in here.servers))
            await asyncio.sleep(RUN_SECONDS)
            await asyncio.gather(*(each.weights.sleep(here.lease) for each in here.servers))
            assert [each.weights.state for each in here.servers] == ["asleep", "asleep"]
            assert [each.weights.identity for each in here.servers] == [None, None]
            pushed.append(here.staged(model))
            assert await here.push(pushed[-1]) == [None, None]
            await here.check_greedy(model)
        tolerance = here.tolerance / TEMPERATURE
        folder_of = {each.identity: str(folder) for each, folder in zip(pushed, sglang_models, strict=False)}
        for completion in (each for group in await asyncio.gather(*running) for each in group):
            assert completion.num_tokens == LONG_TOKENS
            made_by = [span.policy for span in completion.spans]
            assert len(made_by) > 1
            assert made_by == [each.identity for each in pushed][: len(made_by)]  # on a busy machine not of the third
            runs = [[folder_of[span.policy], span.end] for span in completion.spans]
            said = unpack_float32(completion.logprobs)
            assert said == pytest.approx(here.say(SHARED_PROMPT, completion, runs), abs=tolerance)
        assert [each.engine.life for each in here.servers] == [1, 1]

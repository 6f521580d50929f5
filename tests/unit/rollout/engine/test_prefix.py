"""Waves of prompts: the requests that fill the cache once for all groups that start together."""

import asyncio
from collections.abc import Sequence

import pytest

from penstock_rollout.engine.sglang.prefix import PrefixWaves, Prompt
from tests.patience import ANSWER_SECONDS

COMMON = tuple(range(40))


class Recorder:
    """Replaces the engine: records the prompts that it should compute."""

    def __init__(self) -> None:
        self.fills: list[list[Prompt]] = []
        self.error: Exception | None = None

    async def __call__(self, prompts: Sequence[Prompt]) -> None:
        self.fills.append(list(prompts))
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


async def fill_all(waves: PrefixWaves, prompts: Sequence[Prompt]) -> list[BaseException | None]:
    return await asyncio.gather(*(waves.fill(prompt) for prompt in prompts), return_exceptions=True)


async def test_a_wave_computes_the_common_prefix_and_each_prompt_once() -> None:
    engine = Recorder()
    prompts = [(*COMMON, number) for number in (1, 2, 3, 2)]
    await fill_all(PrefixWaves(engine), prompts)
    assert engine.fills == [[COMMON], prompts[:3]]


async def test_a_cached_common_prefix_is_not_asked_for_again_until_a_flush() -> None:
    engine = Recorder()
    waves = PrefixWaves(engine)
    prompts = [(*COMMON, number) for number in (1, 2, 3)]
    for _ in range(2):
        await fill_all(waves, prompts)
    assert engine.fills == [[COMMON], prompts, prompts]
    waves.forget()
    await fill_all(waves, prompts)
    assert engine.fills[3:] == [[COMMON], prompts]


async def test_a_common_prefix_that_was_computed_for_another_reason_is_not_asked_for() -> None:
    engine = Recorder()
    waves = PrefixWaves(engine)
    waves.computes_equal_once = True
    waves.computed((*COMMON, 7, 8))
    await fill_all(waves, [(*COMMON, number) for number in (1, 2, 3)])
    assert engine.fills == []
    await fill_all(waves, [(*COMMON, 9, number) for number in (1, 2, 3)])  # longer than the cached beginning
    assert engine.fills == [[(*COMMON, 9)]]


async def test_a_short_common_prefix_is_not_worth_a_pass() -> None:
    engine = Recorder()
    await fill_all(PrefixWaves(engine), [(1, 2, 3), (1, 2, 4)])
    assert engine.fills == [[(1, 2, 3), (1, 2, 4)]]


async def test_where_equal_prompts_cost_nothing_only_the_common_prefix_goes_ahead() -> None:
    engine = Recorder()
    waves = PrefixWaves(engine)
    waves.computes_equal_once = True
    prompts = [(*COMMON, number) for number in (1, 2, 3)]
    for _ in range(2):
        await fill_all(waves, prompts)
    assert engine.fills == [[COMMON]]
    await fill_all(waves, [(1, 2, 3), (1, 2, 4)])
    assert engine.fills == [[COMMON]]


async def test_a_failed_wave_lets_the_others_go_on_and_the_next_wave_works() -> None:
    engine = Recorder()
    engine.error = ConnectionError("gone")
    waves = PrefixWaves(engine)
    results = await fill_all(waves, [(1,), (2,), (3,)])
    assert [type(result) for result in results] == [ConnectionError, type(None), type(None)]
    engine.error = None
    await fill_all(waves, [(4,)])
    assert engine.fills[-1] == [(4,)]


async def test_a_cancelled_leader_leaves_nobody_waiting() -> None:
    engine = Recorder()
    waves = PrefixWaves(engine)
    leader = asyncio.create_task(waves.fill((1,)))
    await asyncio.sleep(0)
    follower = asyncio.create_task(waves.fill((2,)))
    await asyncio.sleep(0)
    leader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leader
    async with asyncio.timeout(ANSWER_SECONDS):
        await follower
        await waves.fill((3,))

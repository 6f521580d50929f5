"""Canaries and pause modes of a weight update."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from penstock.contracts import Sampling, pack_int32
from penstock.errors import (
    WeightsMismatchError,
)
from penstock_rollout.engine.types import completions
from tests.unit.rollout.one_request import generate
from tests.unit.rollout.weights.updater_setup import ABORT_CYCLE, CYCLE, Rollout, until, updating_rollout


@pytest.fixture
async def rollout(tmp_path: Path) -> AsyncIterator[Rollout]:
    async with updating_rollout(tmp_path) as rollout:
        yield rollout


async def test_a_version_is_served_when_its_canary_has_agreed(rollout: Rollout) -> None:
    await rollout.weights.update(rollout.watched(1))
    assert rollout.fake.paths() == [*CYCLE, "/generate"]  # a paused engine would not answer it
    assert rollout.weights.state == "serving"
    assert rollout.sample("canary_difference_nats") == pytest.approx(0, abs=1e-9)


async def test_an_engine_that_says_it_loaded_and_serves_other_weights_is_fenced_and_catches_up(
    rollout: Rollout,
) -> None:
    await rollout.weights.update(rollout.watched(1))
    rollout.fake.sticks_to = "1-"
    with pytest.raises(WeightsMismatchError, match=r"by 0\.1 nats on average: expected at most 0\.01"):
        await rollout.weights.update(rollout.watched(2))
    assert rollout.weights.identity is None
    assert not rollout.engine.up.is_set()
    assert rollout.sample("weight_updates_failed_total", reason="mismatch") == 1
    rollout.fake.sticks_to = ""
    await rollout.engine.up.wait()
    assert (rollout.server.num_starts, rollout.weights.state) == (2, "fenced")
    await rollout.weights.update(rollout.watched(2))
    assert rollout.weights.state == "serving"


async def test_what_is_loaded_during_a_pause_on_request_is_proved_after_it(rollout: Rollout) -> None:
    await rollout.weights.update(rollout.watched(1))
    await rollout.weights.pause()
    rollout.fake.sticks_to = "1-"
    wanted = rollout.watched(2)
    await rollout.weights.update(wanted)
    assert rollout.weights.unverified == str(wanted.identity)
    with pytest.raises(WeightsMismatchError):
        await rollout.weights.resume()
    assert (rollout.weights.identity, rollout.weights.unverified) == (None, "")
    assert str(wanted.identity) not in rollout.weights.known


async def test_in_place_keeps_caches_and_flushes_nothing(rollout: Rollout) -> None:
    rollout.use(pause_mode="in_place")
    rollout.fake.holds_at = 3  # of 8 tokens
    first, second = rollout.watched(1), rollout.watched(2)
    await rollout.weights.update(first)
    running = asyncio.create_task(generate(rollout.engine, pack_int32([1]), (1, 2), Sampling(1.0, 8, ())))
    await until(lambda: rollout.fake.num_held == 2)
    await rollout.weights.update(second)
    rollout.fake.holds_at = -1
    assert "/flush_cache" not in rollout.fake.paths()
    loads = [body for path, body in rollout.fake.calls if path == "/update_weights_from_disk"]
    assert [body["flush_cache"] for body in loads] == [False, False]
    for completion in completions(await running, rollout.weights.known):
        assert [span.policy for span in completion.spans] == [first.identity, second.identity]
    keys = [body["extra_key"] for path, body in rollout.fake.calls if path == "/generate"]
    assert len(set(keys)) == 2  # the first canary and the group, the second canary


async def test_abort_ends_what_runs_before_it_pauses(rollout: Rollout) -> None:
    rollout.use(pause_mode="abort")
    rollout.fake.holds_at = 3  # of 50 tokens
    await rollout.weights.update(rollout.watched(1))
    rollout.fake.calls.clear()

    async def generating() -> Any:
        with rollout.weights.generating():
            return await generate(rollout.engine, pack_int32([1]), (1,), Sampling(1.0, 50, ()))

    running = asyncio.create_task(generating())
    await until(lambda: rollout.fake.num_held == 1)
    await rollout.weights.update(rollout.watched(2))
    assert rollout.fake.paths() == ["/generate", "/abort_request", *ABORT_CYCLE, "/generate"]
    assert rollout.weights.num_interruptions == 2
    assert (await running)[0].finish_reason == "abort"


async def test_a_version_that_is_loaded_again_is_unknown_if_it_fails_then(rollout: Rollout) -> None:
    wanted = rollout.watched(2)
    await rollout.weights.update(wanted)
    assert rollout.weights.known == {str(wanted.identity): wanted.identity}
    rollout.server.die()
    while rollout.weights.identity is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await rollout.engine.up.wait()
    assert rollout.weights.known == {str(wanted.identity): wanted.identity}
    rollout.fake.sticks_to = "1-"
    with pytest.raises(WeightsMismatchError):
        await rollout.weights.update(wanted)
    assert rollout.weights.known == {}

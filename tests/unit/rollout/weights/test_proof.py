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
from tests.unit.rollout.weights.updater_setup import ABORT_CYCLE, CYCLE, Bench, until, weights_bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with weights_bench(tmp_path) as bench:
        yield bench


async def test_a_version_is_served_when_its_canary_has_been_heard(bench: Bench) -> None:
    await bench.weights.update(bench.watched(1))
    assert bench.fake.paths() == [*CYCLE, "/generate"]  # a paused engine would not answer it
    assert bench.weights.state == "serving"
    assert bench.sample("canary_difference_nats") == pytest.approx(0, abs=1e-9)


async def test_an_engine_that_says_it_loaded_and_serves_other_weights_is_fenced_and_catches_up(bench: Bench) -> None:
    await bench.weights.update(bench.watched(1))
    bench.fake.sticks_to = "1-"
    with pytest.raises(WeightsMismatchError, match=r"by 0\.1 nats on average: expected at most 0\.01"):
        await bench.weights.update(bench.watched(2))
    assert bench.weights.identity is None
    assert not bench.engine.up.is_set()
    assert bench.sample("weight_updates_failed_total", reason="mismatch") == 1
    bench.fake.sticks_to = ""
    await bench.engine.up.wait()
    assert (bench.server.num_starts, bench.weights.state) == (2, "fenced")
    await bench.weights.update(bench.watched(2))
    assert bench.weights.state == "serving"


async def test_what_is_loaded_during_a_pause_on_request_is_proved_after_it(bench: Bench) -> None:
    await bench.weights.update(bench.watched(1))
    await bench.weights.pause()
    bench.fake.sticks_to = "1-"
    wanted = bench.watched(2)
    await bench.weights.update(wanted)
    assert bench.weights.unproved == str(wanted.identity)
    with pytest.raises(WeightsMismatchError):
        await bench.weights.resume()
    assert (bench.weights.identity, bench.weights.unproved) == (None, "")
    assert str(wanted.identity) not in bench.weights.known


async def test_in_place_keeps_caches_and_flushes_nothing(bench: Bench) -> None:
    bench.use(pause_mode="in_place")
    bench.fake.holds_at = 3  # of 8 tokens
    first, second = bench.watched(1), bench.watched(2)
    await bench.weights.update(first)
    running = asyncio.create_task(bench.engine.generate(pack_int32([1]), (1, 2), Sampling(1.0, 8, ())))
    await until(lambda: bench.fake.num_held == 2)
    await bench.weights.update(second)
    bench.fake.holds_at = -1
    assert "/flush_cache" not in bench.fake.paths()
    loads = [body for path, body in bench.fake.calls if path == "/update_weights_from_disk"]
    assert [body["flush_cache"] for body in loads] == [False, False]
    for completion in completions(await running, bench.weights.known):
        assert [span.policy for span in completion.spans] == [first.identity, second.identity]
    keys = [body["extra_key"] for path, body in bench.fake.calls if path == "/generate"]
    assert len(set(keys)) == 2  # the first canary and the group, the second canary


async def test_abort_ends_what_runs_before_it_pauses(bench: Bench) -> None:
    bench.use(pause_mode="abort")
    bench.fake.holds_at = 3  # of 50 tokens
    await bench.weights.update(bench.watched(1))
    bench.fake.calls.clear()

    async def generate() -> Any:
        with bench.weights.generating():
            return await bench.engine.generate(pack_int32([1]), (1,), Sampling(1.0, 50, ()))

    running = asyncio.create_task(generate())
    await until(lambda: bench.fake.num_held == 1)
    await bench.weights.update(bench.watched(2))
    assert bench.fake.paths() == ["/generate", "/abort_request", *ABORT_CYCLE, "/generate"]
    assert bench.weights.num_interruptions == 2
    assert (await running)[0].finish_reason == "abort"


async def test_a_version_that_is_loaded_again_is_unknown_if_it_fails_then(bench: Bench) -> None:
    wanted = bench.watched(2)
    await bench.weights.update(wanted)
    assert bench.weights.known == {str(wanted.identity): wanted.identity}
    bench.server.die()
    while bench.weights.identity is not None:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await bench.engine.up.wait()
    assert bench.weights.known == {str(wanted.identity): wanted.identity}
    bench.fake.sticks_to = "1-"
    with pytest.raises(WeightsMismatchError):
        await bench.weights.update(wanted)
    assert bench.weights.known == {}

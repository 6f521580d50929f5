"""The rules of a weight update."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.contracts import PolicyIdentity, Sampling, pack_int32
from penstock.contracts.services import Announcement
from penstock.errors import (
    EngineDiedError,
    EngineError,
    WeightsBusyError,
    WeightsConflictError,
    WeightsError,
)
from penstock_rollout.app import not_ready
from penstock_rollout.engine.types import completions
from tests.unit.rollout.weights.updater_setup import CYCLE, Bench, until, weights_bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with weights_bench(tmp_path) as bench:
        yield bench


async def test_a_new_version_is_loaded_while_paused_and_flushed(bench: Bench) -> None:
    wanted = bench.staged(1)
    assert bench.weights.behind(wanted)
    await bench.weights.update(wanted)
    assert bench.fake.paths() == CYCLE
    assert bench.weights.identity == wanted.identity
    assert bench.weights.state == "serving"
    assert not bench.weights.behind(wanted)
    assert bench.metrics.registry.get_sample_value("penstock_rollout_policy_version") == 1
    count = "penstock_rollout_weight_update_duration_seconds_count"
    assert bench.metrics.registry.get_sample_value(count, {"transport": "disk"}) == 1


async def test_an_equal_push_changes_nothing(bench: Bench) -> None:
    await bench.weights.update(bench.staged(1))
    await bench.weights.update(bench.staged(1))
    assert bench.fake.paths() == CYCLE


async def test_a_failed_push_fences_until_what_is_wanted_is_served(bench: Bench) -> None:
    first = bench.staged(1)
    await bench.weights.update(first)
    with pytest.raises(WeightsError):
        await bench.weights.update(Announcement(PolicyIdentity(2, "f" * 16), first.path, 1))
    assert (bench.weights.state, bench.sample("fenced")) == ("fenced", 1)
    await bench.weights.update(bench.staged(1, lease=2))  # another trainer goes on from version 1
    assert (bench.weights.state, bench.sample("fenced")) == ("serving", 0)
    assert bench.fake.paths() == CYCLE


async def test_an_older_version_of_the_same_lease_conflicts(bench: Bench) -> None:
    await bench.weights.update(bench.staged(2))
    with pytest.raises(WeightsConflictError, match="newer"):
        await bench.weights.update(bench.staged(1))
    with pytest.raises(WeightsConflictError, match="newer"):
        await bench.weights.update(bench.staged(2, content=b"others"))
    assert bench.weights.identity is not None
    assert bench.weights.identity.number == 2


async def test_a_higher_lease_loads_even_a_lower_version(bench: Bench) -> None:
    await bench.weights.update(bench.staged(5))
    wanted = bench.staged(3, lease=2, content=b"branch")
    assert bench.weights.behind(wanted)
    await bench.weights.update(wanted)
    assert bench.weights.identity == wanted.identity
    with pytest.raises(WeightsConflictError, match="another trainer"):
        await bench.weights.update(bench.staged(6))


async def test_two_updates_at_once_are_too_many(bench: Bench) -> None:
    bench.fake.may_load.clear()
    first = asyncio.create_task(bench.weights.update(bench.staged(1)))
    while bench.weights.state != "updating":  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(WeightsBusyError):
        await bench.weights.update(bench.staged(2))
    bench.fake.may_load.set()
    await first


@pytest.mark.parametrize("damage", ["missing", "other", "bytes"])
async def test_bytes_that_are_not_those_announced_touch_nothing(bench: Bench, damage: str) -> None:
    await bench.weights.update(bench.staged(1))
    bench.fake.calls.clear()
    wanted = bench.staged(2)
    file = Path(wanted.path) / "model.safetensors"
    if damage == "missing":
        wanted = Announcement(wanted.identity, str(bench.root / "nowhere"), 1)
    elif damage == "other":
        wanted = Announcement(PolicyIdentity(2, "f" * 16), wanted.path, 1)
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError):
        await bench.weights.update(wanted)
    assert bench.fake.calls == []
    assert bench.weights.state == "fenced"
    assert bench.weights.identity is not None
    assert bench.weights.identity.number == 1
    assert bench.sample("weight_updates_failed_total", reason="files") == 1


@pytest.mark.parametrize("fault", ["refused", "another version", "too late"])
async def test_a_load_that_fails_half_way_restarts_the_engine(bench: Bench, fault: str) -> None:
    await bench.weights.update(bench.staged(1))
    bench.fake.calls.clear()
    if fault == "refused":
        bench.fake.fail_load = "shape mismatch"
    elif fault == "another version":
        bench.fake.lie_about_version = True
    else:
        bench.fake.may_load.clear()
        bench.use(push_timeout_seconds=1)
    with pytest.raises((EngineError, TimeoutError)) as caught:
        await bench.weights.update(bench.staged(2))
    assert bench.weights.identity is None
    assert str(caught.value) in bench.weights.fenced
    assert bench.sample("fenced") == 1
    label = "late" if fault == "too late" else "engine"
    assert bench.sample("weight_updates_failed_total", reason=label) == 1
    assert not bench.engine.up.is_set()
    assert "/continue_generation" not in bench.fake.paths()
    bench.fake.lie_about_version = False
    bench.fake.may_load.set()
    await bench.engine.up.wait()
    assert bench.server.num_starts == 2
    assert bench.weights.state == "fenced"
    assert str(caught.value) in (not_ready(bench.engine, bench.weights) or "")
    bench.use()
    await bench.weights.update(bench.staged(2))
    assert (bench.weights.state, bench.weights.fenced, bench.sample("fenced")) == ("serving", "", 0)


async def test_a_running_group_continues_with_the_new_weights(bench: Bench) -> None:
    bench.fake.holds_at = 3  # of 8 tokens
    first, second = bench.staged(1), bench.staged(2)
    await bench.weights.update(first)
    running = asyncio.create_task(bench.engine.generate(pack_int32([1]), (1, 2), Sampling(1.0, 8, ())))
    await until(lambda: bench.fake.num_held == 2)
    await bench.weights.update(second)
    bench.fake.holds_at = -1
    for completion in completions(await running, bench.weights.known):
        assert [span.policy for span in completion.spans] == [first.identity, second.identity]


async def test_a_pause_on_request_outlives_an_update(bench: Bench) -> None:
    await bench.weights.pause()
    await bench.weights.update(bench.staged(1))
    assert (bench.weights.state, bench.fake.going_on.is_set()) == ("paused", False)
    await bench.weights.resume()
    assert (bench.weights.state, bench.fake.going_on.is_set()) == ("serving", True)


async def test_a_dead_engine_takes_no_push_and_forgets_its_weights(bench: Bench) -> None:
    await bench.weights.update(bench.staged(1))
    bench.server.die()
    while bench.engine.up.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(EngineDiedError):
        await bench.weights.update(bench.staged(2))
    await bench.engine.up.wait()
    assert bench.weights.identity is None


async def test_reports_about_an_earlier_engine_are_old_news(bench: Bench) -> None:
    bench.engine.report(bench.engine.epoch, "first")
    while bench.server.num_starts < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await bench.engine.up.wait()
    bench.engine.report(bench.engine.epoch - 1, "late")
    assert bench.engine.up.is_set()

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
from penstock_rollout.engine.types import completions
from penstock_rollout.generator import Generator
from tests.unit.rollout.one_request import generate
from tests.unit.rollout.weights.updater_setup import CYCLE, Rollout, until, updating_rollout


@pytest.fixture
async def rollout(tmp_path: Path) -> AsyncIterator[Rollout]:
    async with updating_rollout(tmp_path) as rollout:
        yield rollout


async def test_a_new_version_is_loaded_while_paused_and_flushed(rollout: Rollout) -> None:
    wanted = rollout.staged(1)
    assert rollout.weights.behind(wanted)
    await rollout.weights.update(wanted)
    assert rollout.fake.paths() == CYCLE
    assert rollout.weights.identity == wanted.identity
    assert rollout.weights.state == "serving"
    assert not rollout.weights.behind(wanted)
    assert rollout.metrics.registry.get_sample_value("penstock_rollout_policy_version") == 1
    count = "penstock_rollout_weight_update_duration_seconds_count"
    assert rollout.metrics.registry.get_sample_value(count, {"transport": "disk"}) == 1


async def test_an_equal_push_changes_nothing(rollout: Rollout) -> None:
    await rollout.weights.update(rollout.staged(1))
    await rollout.weights.update(rollout.staged(1))
    assert rollout.fake.paths() == CYCLE


async def test_a_failed_push_fences_until_what_is_wanted_is_served(rollout: Rollout) -> None:
    first = rollout.staged(1)
    await rollout.weights.update(first)
    with pytest.raises(WeightsError):
        await rollout.weights.update(Announcement(PolicyIdentity(2, "f" * 16), first.path, 1))
    assert (rollout.weights.state, rollout.sample("fenced")) == ("fenced", 1)
    await rollout.weights.update(rollout.staged(1, lease=2))  # another trainer goes on from version 1
    assert (rollout.weights.state, rollout.sample("fenced")) == ("serving", 0)
    assert rollout.fake.paths() == CYCLE


async def test_an_older_version_of_the_same_lease_conflicts(rollout: Rollout) -> None:
    await rollout.weights.update(rollout.staged(2))
    with pytest.raises(WeightsConflictError, match="newer"):
        await rollout.weights.update(rollout.staged(1))
    with pytest.raises(WeightsConflictError, match="newer"):
        await rollout.weights.update(rollout.staged(2, content=b"others"))
    assert rollout.weights.identity is not None
    assert rollout.weights.identity.number == 2


async def test_a_higher_lease_loads_even_a_lower_version(rollout: Rollout) -> None:
    await rollout.weights.update(rollout.staged(5))
    wanted = rollout.staged(3, lease=2, content=b"branch")
    assert rollout.weights.behind(wanted)
    await rollout.weights.update(wanted)
    assert rollout.weights.identity == wanted.identity
    with pytest.raises(WeightsConflictError, match="another trainer"):
        await rollout.weights.update(rollout.staged(6))


async def test_two_updates_at_once_are_too_many(rollout: Rollout) -> None:
    rollout.fake.may_load.clear()
    first = asyncio.create_task(rollout.weights.update(rollout.staged(1)))
    while rollout.weights.state != "updating":  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(WeightsBusyError):
        await rollout.weights.update(rollout.staged(2))
    rollout.fake.may_load.set()
    await first


@pytest.mark.parametrize("damage", ["missing", "other", "bytes"])
async def test_bytes_that_are_not_those_announced_touch_nothing(rollout: Rollout, damage: str) -> None:
    await rollout.weights.update(rollout.staged(1))
    rollout.fake.calls.clear()
    wanted = rollout.staged(2)
    file = Path(wanted.path) / "model.safetensors"
    if damage == "missing":
        wanted = Announcement(wanted.identity, str(rollout.root / "nowhere"), 1)
    elif damage == "other":
        wanted = Announcement(PolicyIdentity(2, "f" * 16), wanted.path, 1)
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(WeightsError):
        await rollout.weights.update(wanted)
    assert rollout.fake.calls == []
    assert rollout.weights.state == "fenced"
    assert rollout.weights.identity is not None
    assert rollout.weights.identity.number == 1
    assert rollout.sample("weight_updates_failed_total", reason="files") == 1


@pytest.mark.parametrize("fault", ["refused", "another version", "too late"])
async def test_a_load_that_fails_half_way_restarts_the_engine(rollout: Rollout, fault: str) -> None:
    await rollout.weights.update(rollout.staged(1))
    rollout.fake.calls.clear()
    if fault == "refused":
        rollout.fake.fail_load = "shape mismatch"
    elif fault == "another version":
        rollout.fake.lie_about_version = True
    else:
        rollout.fake.may_load.clear()
        rollout.use(push_timeout_seconds=1)
    with pytest.raises((EngineError, TimeoutError)) as caught:
        await rollout.weights.update(rollout.staged(2))
    assert rollout.weights.identity is None
    assert str(caught.value) in rollout.weights.fenced
    assert rollout.sample("fenced") == 1
    label = "late" if fault == "too late" else "engine"
    assert rollout.sample("weight_updates_failed_total", reason=label) == 1
    assert not rollout.engine.up.is_set()
    assert "/continue_generation" not in rollout.fake.paths()
    rollout.fake.lie_about_version = False
    rollout.fake.may_load.set()
    await rollout.engine.up.wait()
    assert rollout.server.num_starts == 2
    assert rollout.weights.state == "fenced"
    assert str(caught.value) in (Generator(rollout.engine, rollout.weights, rollout.metrics).not_ready or "")
    rollout.use()
    await rollout.weights.update(rollout.staged(2))
    assert (rollout.weights.state, rollout.weights.fenced, rollout.sample("fenced")) == ("serving", "", 0)


async def test_a_running_group_continues_with_the_new_weights(rollout: Rollout) -> None:
    rollout.fake.holds_at = 3  # of 8 tokens
    first, second = rollout.staged(1), rollout.staged(2)
    await rollout.weights.update(first)
    running = asyncio.create_task(generate(rollout.engine, pack_int32([1]), (1, 2), Sampling(1.0, 8, ())))
    await until(lambda: rollout.fake.num_held == 2)
    await rollout.weights.update(second)
    rollout.fake.holds_at = -1
    for completion in completions(await running, rollout.weights.known):
        assert [span.policy for span in completion.spans] == [first.identity, second.identity]


async def test_a_pause_on_request_outlives_an_update(rollout: Rollout) -> None:
    await rollout.weights.pause()
    await rollout.weights.update(rollout.staged(1))
    assert (rollout.weights.state, rollout.fake.going_on.is_set()) == ("paused", False)
    await rollout.weights.resume()
    assert (rollout.weights.state, rollout.fake.going_on.is_set()) == ("serving", True)


async def test_a_dead_engine_takes_no_push_and_forgets_its_weights(rollout: Rollout) -> None:
    await rollout.weights.update(rollout.staged(1))
    rollout.server.die()
    while rollout.engine.up.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(EngineDiedError):
        await rollout.weights.update(rollout.staged(2))
    await rollout.engine.up.wait()
    assert rollout.weights.identity is None


async def test_reports_about_an_earlier_engine_are_old_news(rollout: Rollout) -> None:
    rollout.engine.report(rollout.engine.life, "first")
    while rollout.server.num_starts < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await rollout.engine.up.wait()
    rollout.engine.report(rollout.engine.life - 1, "late")
    assert rollout.engine.up.is_set()

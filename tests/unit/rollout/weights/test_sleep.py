"""An engine gives up its GPU memory, and serves again with the weights of the next update."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock.errors import EngineError, WeightsBusyError, WeightsConflictError, WeightsError
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.producer_setup import G, producing_rollout, ticket
from tests.unit.rollout.producer_setup import Rollout as Producing
from tests.unit.rollout.weights.updater_setup import Rollout, until, updating_rollout

SLEEP_SECONDS = 0.3
SLEEP = ["/abort_request", "/pause_generation", "/set_internal_state", "/release_memory_occupation"]
WAKE = [
    "/resume_memory_occupation",
    "/update_weights_from_disk",
    "/resume_memory_occupation",
    "/flush_cache",
    "/continue_generation",
]


@pytest.fixture
async def rollout(tmp_path: Path) -> AsyncIterator[Rollout]:
    async with updating_rollout(tmp_path) as rollout:
        await rollout.weights.update(rollout.watched(1))
        rollout.fake.calls.clear()
        yield rollout
        assert rollout.fake.faults == []


@pytest.fixture
async def producing(tmp_path: Path) -> AsyncIterator[Producing]:
    async with producing_rollout(tmp_path) as rollout:
        rollout.announce(1)
        yield rollout
        assert rollout.fake.faults == []


async def test_it_gives_up_its_memory_and_the_next_update_takes_it_again(rollout: Rollout) -> None:
    await rollout.weights.sleep(1)
    assert rollout.fake.paths() == SLEEP
    assert rollout.fake.given_up == {"weights", "kv_cache", "cuda_graph"}
    assert (rollout.weights.state, rollout.weights.identity) == ("asleep", None)
    await rollout.weights.sleep(1)
    assert rollout.fake.paths() == SLEEP  # it sleeps already
    rollout.fake.calls.clear()
    wanted = rollout.watched(2)
    await rollout.weights.update(wanted)
    assert [each for each in rollout.fake.paths() if each != "/generate"] == WAKE  # and /generate is the canary
    assert [body["tags"] for path, body in rollout.fake.calls if path == WAKE[0]] == [
        ["weights"],
        ["kv_cache", "cuda_graph"],
    ]
    assert (rollout.weights.state, rollout.weights.identity) == ("serving", wanted.identity)
    assert (rollout.sample("asleep_seconds_total") or 0) > 0
    assert rollout.engine.life == 1


async def test_the_version_that_it_served_before_is_loaded_again(rollout: Rollout) -> None:
    served = rollout.watched(1)
    await rollout.weights.sleep(1)
    await rollout.weights.update(served)
    assert (rollout.weights.state, rollout.weights.identity) == ("serving", served.identity)
    assert "/update_weights_from_disk" in rollout.fake.paths()


async def test_weights_that_the_canary_refuses_are_not_served_after_a_sleep(rollout: Rollout) -> None:
    await rollout.weights.sleep(1)
    rollout.fake.sticks_to = "0-"
    with pytest.raises(WeightsError):
        await rollout.weights.update(rollout.watched(2))
    assert rollout.weights.identity is None
    await until(lambda: rollout.engine.life == 2)
    assert not rollout.weights.asleep


async def test_files_that_are_missing_leave_it_asleep(rollout: Rollout) -> None:
    await rollout.weights.sleep(1)
    wanted = rollout.watched(2)
    await asyncio.to_thread(shutil.rmtree, wanted.path)
    with pytest.raises(WeightsError):
        await rollout.weights.update(wanted)
    assert (rollout.weights.state, rollout.engine.life) == ("asleep", 1)
    await rollout.weights.update(rollout.watched(3))
    assert rollout.weights.state == "serving"


async def test_an_engine_that_does_not_give_up_its_memory_is_killed(rollout: Rollout) -> None:
    rollout.use(push_timeout_seconds=0.2)
    rollout.fake.may_give_up.clear()
    with pytest.raises(TimeoutError):
        await rollout.weights.sleep(1)
    assert not rollout.weights.asleep
    assert rollout.weights.identity is None
    await until(lambda: rollout.engine.life == 2)


async def test_an_engine_that_dies_while_it_sleeps_has_no_weights_and_all_its_memory(rollout: Rollout) -> None:
    await rollout.weights.sleep(1)
    rollout.server.die()
    await until(lambda: rollout.engine.life == 2)
    assert (rollout.weights.state, rollout.weights.asleep) == ("waiting", False)
    async with asyncio.timeout(ANSWER_SECONDS):
        await rollout.weights.settled()


async def test_nobody_resumes_a_generation_that_has_no_memory(rollout: Rollout) -> None:
    await rollout.weights.sleep(1)
    rollout.fake.calls.clear()
    await rollout.weights.pause()
    await rollout.weights.resume()
    assert rollout.fake.calls == []
    assert rollout.weights.state == "asleep"


async def test_a_hold_lasts_beyond_a_sleep(rollout: Rollout) -> None:
    await rollout.weights.pause()
    await rollout.weights.sleep(1)
    await rollout.weights.update(rollout.watched(2))
    assert rollout.weights.state == "paused"
    assert not rollout.fake.going_on.is_set()
    await rollout.weights.resume()
    assert rollout.weights.state == "serving"


async def test_it_does_not_sleep_during_an_update_nor_for_a_trainer_that_was_replaced(rollout: Rollout) -> None:
    rollout.fake.may_load.clear()
    updating = asyncio.create_task(rollout.weights.update(rollout.staged(2, lease=2)))
    await until(lambda: "/update_weights_from_disk" in rollout.fake.paths())
    with pytest.raises(WeightsBusyError):
        await rollout.weights.sleep(2)
    rollout.fake.may_load.set()
    await updating
    with pytest.raises(WeightsConflictError):
        await rollout.weights.sleep(1)
    assert rollout.weights.state == "serving"


async def test_a_push_of_the_replaced_trainer_wakes_nobody(rollout: Rollout) -> None:
    await rollout.weights.sleep(2)
    with pytest.raises(WeightsConflictError):
        await rollout.weights.update(rollout.staged(2, lease=1))
    assert rollout.weights.asleep


async def test_an_update_waits_until_it_sleeps(rollout: Rollout) -> None:
    rollout.fake.may_give_up.clear()
    falling = asyncio.create_task(rollout.weights.sleep(1))
    await until(lambda: SLEEP[-1] in rollout.fake.paths())
    assert rollout.weights.state == "updating"
    with pytest.raises(WeightsBusyError):
        await rollout.weights.update(rollout.watched(2))
    rollout.fake.may_give_up.set()
    await falling
    await rollout.weights.update(rollout.watched(2))


@pytest.mark.parametrize("pause_mode", ["retract", "abort"])
async def test_what_a_sleep_cuts_goes_on_with_the_next_weights(producing: Producing, pause_mode: str) -> None:
    producing.use(pause_mode=pause_mode)
    producing.queue.put(ticket(0, tokens=12))
    await producing.until(lambda: producing.queue.published)
    producing.fake.holds_at = 3  # of 12 tokens
    producing.queue.put(ticket(0, tokens=12))
    began = time.monotonic()
    await producing.until(lambda: producing.fake.num_held == G)
    await producing.weights.sleep(1)
    asleep = time.monotonic()
    producing.fake.holds_at = -1
    producing.queue.put(ticket(1))
    await producing.until(lambda: producing.fake.num_running == 0)
    assert len(producing.queue.published) == 1
    assert producing.queue.taken == ["0", "0"]  # no ticket is taken meanwhile
    await asyncio.sleep(SLEEP_SECONDS)
    slept = time.monotonic() - asleep
    producing.announce(2)
    assert producing.queue.announced is not None
    await producing.weights.update(producing.queue.announced)
    await producing.until(lambda: len(producing.queue.published) == 3)
    all_seconds = time.monotonic() - began
    uncut, *rest = producing.queue.published
    cut = next(each for each in rest if each.ticket.number == 0)
    for expected, completion in zip(uncut.completions, cut.completions, strict=True):
        assert completion.token_ids == expected.token_ids
        assert [(span.policy.number, span.start, span.end) for span in completion.spans] == [(1, 0, 3), (2, 3, 12)]
    assert producing.queue.returned == []
    assert 0 < cut.ended_at - cut.started_at <= all_seconds - slept + 0.01  # the sleep was no generation


async def test_what_was_cut_by_an_engine_that_had_to_be_killed_is_free_again(producing: Producing) -> None:
    await producing.until(lambda: producing.weights.state == "serving")
    producing.fake.holds_at = 3
    producing.queue.put(ticket(0, tokens=12))
    await producing.until(lambda: producing.fake.num_held == G)
    producing.use(push_timeout_seconds=1.0)
    producing.fake.may_give_up.clear()
    with pytest.raises((TimeoutError, EngineError)):
        await producing.weights.sleep(1)
    producing.fake.open()
    await producing.until(lambda: producing.queue.published)
    assert producing.queue.returned == [("0", "free")]  # its death is not the ticket's fault
    assert producing.server.num_starts == 2

"""Groups that run while weights change: cut and continued, or lost with an engine that failed its canary."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from penstock.contracts import Completion, PolicyIdentity
from penstock.contracts.services import Announcement
from penstock.errors import WeightsError, WeightsMismatchError
from tests.unit.rollout.producer_setup import G, Rollout, producing_rollout, ticket


@pytest.fixture
async def rollout(tmp_path: Path) -> AsyncIterator[Rollout]:
    async with producing_rollout(tmp_path) as rollout:
        yield rollout


def versions(completion: Completion) -> list[int]:
    return [span.policy.number for span in completion.spans for _ in range(span.end - span.start)]


@pytest.mark.parametrize("reports_spans", [True, False])
async def test_what_updates_cut_goes_on_where_it_was(rollout: Rollout, reports_spans: bool) -> None:
    rollout.use(pause_mode="abort")
    rollout.queue.put(ticket(0, tokens=12))
    rollout.announce(1)
    await rollout.until(lambda: rollout.queue.published)
    rollout.fake.reports_spans, rollout.fake.holds_at = reports_spans, 3  # of 12 tokens
    rollout.queue.put(ticket(0, tokens=12))
    for turn, version in enumerate((2, 3), start=1):
        await rollout.until(partial(lambda count: rollout.fake.num_held == count, turn * G))
        rollout.announce(version)
        assert rollout.queue.announced is not None
        await rollout.weights.update(rollout.queue.announced)
    rollout.fake.holds_at = -1
    await rollout.until(lambda: len(rollout.queue.published) == 2)
    uncut, cut = rollout.queue.published
    assert rollout.queue.returned == []
    for expected, completion in zip(uncut.completions, cut.completions, strict=True):
        assert completion.token_ids == expected.token_ids
        assert completion.text == expected.text
        assert completion.finish_reason == "length"
        made_by = versions(completion)
        assert (len(made_by), sorted(made_by), set(made_by)) == (12, made_by, {1, 2, 3})


async def test_an_engine_without_spans_needs_the_mode_that_empties_it(rollout: Rollout) -> None:
    rollout.fake.reports_spans = False
    rollout.queue.put(ticket(0))
    rollout.announce(1)
    await rollout.until(lambda: len(rollout.queue.returned) == 3)
    assert rollout.queue.published == []
    assert "weights.pause_mode abort" in rollout.queue.reasons[0]


async def test_a_push_of_what_nobody_announces_fences_no_server_for_long(rollout: Rollout) -> None:
    """It takes tickets of the announced version all the time, and says so."""
    rollout.announce(1)
    await rollout.until(lambda: rollout.weights.state == "serving")
    announced = rollout.queue.announced
    assert announced is not None
    with pytest.raises(WeightsError, match="cannot be read"):
        await rollout.weights.update(Announcement(PolicyIdentity(7, "f" * 16), str(rollout.root / "nowhere"), 1))
    assert rollout.weights.state == "fenced"
    await rollout.until(lambda: rollout.weights.state == "serving")
    assert rollout.metrics.registry.get_sample_value("penstock_rollout_fenced") == 0
    assert (rollout.weights.identity, rollout.weights.fenced) == (announced.identity, "")


async def test_a_server_that_does_not_serve_what_is_announced_stays_fenced(rollout: Rollout) -> None:
    rollout.announce(1)
    await rollout.until(lambda: rollout.weights.state == "serving")
    assert rollout.queue.announced is not None
    missing = Announcement(PolicyIdentity(2, "f" * 16), str(rollout.root / "nowhere"), 1)
    rollout.queue.announced = missing
    await rollout.until(lambda: rollout.weights.state == "fenced")
    rollout.weights.confirm(missing)
    assert rollout.weights.state == "fenced"
    rollout.announce(3)
    await rollout.until(lambda: rollout.weights.state == "serving")


async def test_nothing_that_a_failed_canary_could_have_made_is_published(rollout: Rollout) -> None:
    """The engine reports that it has loaded version 2, but serves version 1: its answers from then on are discarded."""
    rollout.fake.holds_at = 3  # of 20 tokens
    rollout.announce(1, canary=True)
    rollout.queue.put(ticket(0, tokens=20))
    await rollout.until(lambda: rollout.fake.num_held == G)
    rollout.fake.sticks_to = "1-"
    rollout.fake.may_probe.clear()
    rollout.announce(2, canary=True)
    assert rollout.queue.announced is not None
    updating = asyncio.create_task(rollout.weights.update(rollout.queue.announced))
    await rollout.until(lambda: "/continue_generation" in rollout.fake.paths()[-2:])
    rollout.fake.holds_at = -1  # the group ends while the canary still runs
    rollout.queue.put(ticket(1))
    await rollout.until(lambda: rollout.fake.num_running == 0)
    assert rollout.queue.published == []
    rollout.fake.may_probe.set()
    with pytest.raises(WeightsMismatchError):
        await updating
    assert rollout.queue.taken == ["0"]
    rollout.fake.sticks_to = ""
    await rollout.until(lambda: len(rollout.queue.published) == 2)
    assert rollout.queue.returned == [("0", "free")]  # its end is not counted as a death
    assert rollout.server.num_starts == 2
    for group in rollout.queue.published:
        assert {version for each in group.completions for version in versions(each)} == {2}


async def test_no_ticket_is_a_reason_to_wake_an_engine(rollout: Rollout) -> None:
    """It looked for the files of weights that are missing; meanwhile the trainer's turn on the GPU has begun."""
    looks, may_find, found = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def files_of(announced: Announcement, needs_full: bool) -> Announcement:
        looks.set()
        await may_find.wait()
        found.set()
        return announced

    rollout.producer._files_of = files_of
    rollout.announce(1)
    await looks.wait()
    await rollout.weights.sleep(1)
    may_find.set()
    await found.wait()
    assert rollout.weights.state == "asleep"
    await rollout.producer.load_announced()
    assert rollout.weights.state == "serving"

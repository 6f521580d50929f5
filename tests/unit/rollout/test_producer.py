"""The loop from tickets to groups, against a fake engine and an in-memory queue."""

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.contracts import ServerState
from penstock_rollout import producer
from penstock_rollout.metrics import RolloutMetrics
from tests.patience import ANSWER_SECONDS
from tests.unit.rollout.producer_setup import G, Rollout, producing_rollout, ticket


@pytest.fixture
async def rollout(tmp_path: Path) -> AsyncIterator[Rollout]:
    async with producing_rollout(tmp_path) as rollout:
        yield rollout


async def test_tickets_become_groups_under_the_announced_weights(rollout: Rollout) -> None:
    for number in range(6):
        rollout.queue.put(ticket(number))
    rollout.announce(1)
    await rollout.until(lambda: len(rollout.queue.published) == 6)
    assert rollout.queue.announced is not None
    for group in rollout.queue.published:
        assert len(group.completions) == G
        assert group.server == "server"
        assert group.started_at <= group.ended_at
        assert {span.policy for each in group.completions for span in each.spans} == {rollout.queue.announced.identity}
    assert rollout.groups("published") == 6
    assert rollout.metrics.registry.get_sample_value("penstock_rollout_completion_tokens_total") == 6 * G * 3
    assert rollout.metrics.registry.get_sample_value("penstock_rollout_prompt_tokens_total") == 6 * 2


async def test_a_time_of_day_that_is_set_back_leaves_a_group_its_duration(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_day = count(1_000.0, -600.0)  # ten minutes earlier at each look
    own = SimpleNamespace(time=lambda: next(of_day), monotonic=time.monotonic)
    monkeypatch.setattr(producer, "time", own)
    rollout.queue.put(ticket(0))
    rollout.announce(1)
    await rollout.until(lambda: rollout.queue.published)
    (group,) = rollout.queue.published
    assert 0 <= group.ended_at - group.started_at < ANSWER_SECONDS


async def test_while_tickets_come_the_announced_version_is_not_read(rollout: Rollout) -> None:
    """At a thousand servers each read counts. A server that is behind is refused a ticket, and reads."""
    rollout.announce(1)
    for number in range(6):
        rollout.queue.put(ticket(number))
        await rollout.until(lambda done=number + 1: len(rollout.queue.published) == done)
        if number == 0:
            num_read = rollout.queue.num_announcements_read
    assert rollout.queue.num_announcements_read == num_read
    rollout.announce(2)
    rollout.queue.put(ticket(6))
    await rollout.until(lambda: len(rollout.queue.published) == 7)
    assert rollout.queue.published[-1].completions[0].oldest_version == 2


async def test_nothing_is_taken_before_a_version_is_announced(rollout: Rollout) -> None:
    """Also by a server that has been pushed one."""
    rollout.queue.put(ticket(0))
    rollout.announce(1)
    pushed, rollout.queue.announced = rollout.queue.announced, None
    assert pushed is not None
    await rollout.until(lambda: rollout.weights.state is not ServerState.STARTING)
    await rollout.weights.update(pushed)
    await asyncio.sleep(0.2)
    assert rollout.queue.taken == []
    rollout.queue.announced = pushed
    await rollout.until(lambda: rollout.queue.published)


async def test_in_a_run_of_agents_it_takes_nothing_and_follows_the_announced_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent service takes the tickets, and calls."""
    monkeypatch.setattr(producer, "WAIT_SECONDS", 0.02)
    async with producing_rollout(tmp_path, agent={"environment": "my_envs:Guess"}) as rollout:
        rollout.queue.put(ticket(0))
        for version in (1, 2):
            rollout.announce(version)
            assert rollout.queue.announced is not None
            announced = rollout.queue.announced
            await rollout.until(lambda wanted=announced.identity: rollout.weights.identity == wanted)
        rollout.stop.set()
    assert rollout.queue.taken == []


async def test_the_hand_over_of_a_server_that_waits_for_tickets_asks_for_none(rollout: Rollout) -> None:
    rollout.queue.put(ticket(0))
    rollout.announce(1)
    await rollout.until(lambda: rollout.queue.published)
    assert rollout.queue.num_asked_with_hand_over == 0


async def test_a_server_that_is_behind_loads_before_it_takes(rollout: Rollout) -> None:
    rollout.announce(1)
    await rollout.until(lambda: rollout.weights.identity is not None)
    rollout.announce(2)
    rollout.queue.put(ticket(0))
    await rollout.until(lambda: rollout.queue.published)
    (group,) = rollout.queue.published
    assert group.completions[0].oldest_version == 2


async def test_a_new_lease_is_followed_even_to_a_lower_version(rollout: Rollout) -> None:
    rollout.announce(5)
    await rollout.until(lambda: rollout.weights.identity is not None)
    rollout.announce(2, lease=2)
    rollout.queue.put(ticket(0))
    await rollout.until(lambda: rollout.queue.published)
    assert rollout.queue.published[0].completions[0].oldest_version == 2


async def test_no_more_completions_run_than_the_engine_holds(rollout: Rollout) -> None:
    rollout.fake.holds_at = 1
    for number in range(10):
        rollout.queue.put(ticket(number))
    rollout.announce(1)
    await rollout.until(lambda: rollout.fake.num_held == 4 * G)
    rollout.fake.holds_at = -1
    await rollout.until(lambda: len(rollout.queue.published) == 10)
    assert rollout.fake.max_running == 4 * G
    assert rollout.queue.followed >= 6 - 4, "hand-overs do not take the next ticket"


async def test_malformed_tickets_are_buried(rollout: Rollout) -> None:
    rollout.queue.put(ticket(0), payload=b"not a ticket")
    rollout.announce(1)
    await rollout.until(lambda: rollout.queue.buried)
    assert "not a Ticket" in rollout.queue.buried[0]


async def test_what_the_engine_refuses_counts_as_failed(rollout: Rollout) -> None:
    rollout.queue.put(ticket(0, tokens=1000))
    rollout.queue.put(ticket(1))
    rollout.announce(1)
    await rollout.until(lambda: len(rollout.queue.returned) == 3 and rollout.queue.published)
    assert rollout.queue.returned == [("0", "failed")] * 3
    assert [group.ticket.number for group in rollout.queue.published] == [1]


async def test_aborted_completions_are_never_published(rollout: Rollout) -> None:
    rollout.fake.finish_reason = "abort"
    rollout.queue.put(ticket(0))
    rollout.announce(1)
    await rollout.until(lambda: len(rollout.queue.returned) == 3)
    assert rollout.queue.published == []
    assert rollout.groups("aborted") == 3


async def test_a_dead_engine_is_restarted_with_the_announced_weights(rollout: Rollout) -> None:
    rollout.fake.holds_at = 1  # still running when it dies
    rollout.queue.put(ticket(0))
    rollout.queue.put(ticket(1))
    rollout.announce(1)
    await rollout.until(lambda: rollout.fake.num_running == 2 * G)
    rollout.server.die()
    rollout.fake.holds_at = -1
    await rollout.until(lambda: len(rollout.queue.published) == 2)
    assert sorted(rollout.queue.returned) == [("0", "engine_died"), ("1", "engine_died")]
    assert rollout.server.num_starts == 2
    assert rollout.queue.published[0].completions[0].oldest_version == 1


async def test_a_ticket_that_two_engines_died_with_runs_alone(rollout: Rollout) -> None:
    rollout.fake.token_seconds = 0.05
    rollout.queue.put(ticket(0))
    rollout.queue.put(ticket(1), engine_deaths=2)
    rollout.queue.put(ticket(2))
    rollout.announce(1)
    await rollout.until(lambda: len(rollout.queue.published) == 3)
    assert rollout.fake.max_running == G
    assert [group.ticket.number for group in rollout.queue.published] == [0, 1, 2]


async def test_a_ticket_that_is_to_run_alone_and_comes_with_a_hand_over_runs_alone(rollout: Rollout) -> None:
    rollout.fake.holds_at = 1
    for number in range(4):
        rollout.queue.put(ticket(number, tokens=3 + number))
    rollout.announce(1)
    await rollout.until(lambda: rollout.fake.num_running == 4 * G)
    rollout.queue.put(ticket(4), engine_deaths=2)
    for number in range(5, 8):
        rollout.queue.put(ticket(number))
    rollout.fake.holds_at = -1
    await rollout.until(lambda: len(rollout.queue.published) == 8)
    assert ("4", "free") in rollout.queue.returned
    alone, *others = sorted(rollout.queue.published, key=lambda group: group.ticket.number != 4)
    assert all(each.ended_at <= alone.started_at or each.started_at >= alone.ended_at for each in others)


async def test_evaluation_takes_its_share_and_all_when_nothing_else_waits(rollout: Rollout) -> None:
    rollout.fake.holds_at = 1
    for number in range(6):
        rollout.queue.put(ticket(number))
        rollout.queue.put(ticket(number, "eval"))
    rollout.announce(1)
    await rollout.until(lambda: rollout.fake.num_running == 4 * G)
    assert sorted(rollout.queue.taken) == ["0", "1", "2", "e0"]  # a quarter of four groups
    rollout.fake.holds_at = -1
    await rollout.until(lambda: len(rollout.queue.published) == 12)


async def test_at_the_end_what_runs_is_finished(rollout: Rollout) -> None:
    rollout.fake.holds_at = 1
    rollout.queue.put(ticket(0))
    rollout.announce(1)
    await rollout.until(lambda: rollout.fake.num_running)
    rollout.stop.set()
    rollout.fake.holds_at = -1
    await rollout.until(lambda: rollout.queue.published)


async def test_the_end_cuts_a_long_wait_for_tickets_short(rollout: Rollout) -> None:
    rollout.queue.ask_seconds = 1e6
    rollout.announce(1)
    await rollout.until(rollout.queue.waits.is_set)
    rollout.stop.set()  # the fixture waits for the loop's end


async def test_at_the_end_what_takes_too_long_is_given_back(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_rollout.producer.DRAIN_SECONDS", 0.1)
    rollout.fake.holds_at = 1
    rollout.queue.put(ticket(0))
    rollout.announce(1)
    await rollout.until(lambda: rollout.fake.num_running)
    rollout.stop.set()
    await rollout.until(lambda: rollout.queue.returned)
    assert rollout.queue.returned == [("0", "free")]


async def test_busy_time_counts_training_only() -> None:
    now = 0.0
    metrics = RolloutMetrics(clock=lambda: now)
    with metrics.running(training=True):
        now = 2.0
        with metrics.running(training=True):
            now = 3.0
    with metrics.running(training=False):
        now = 10.0
    assert metrics.registry.get_sample_value("penstock_rollout_generation_busy_seconds_total") == 3.0

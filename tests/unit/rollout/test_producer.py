"""The loop from tickets to groups, against a fake engine and an in-memory queue."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from penstock_rollout.metrics import RolloutMetrics
from tests.unit.rollout.producer_setup import Bench, G, producer_bench, ticket


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with producer_bench(tmp_path) as bench:
        yield bench


async def test_tickets_become_groups_under_the_announced_weights(bench: Bench) -> None:
    for number in range(6):
        bench.queue.put(ticket(number))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.published) == 6)
    assert bench.queue.announced is not None
    for group in bench.queue.published:
        assert len(group.completions) == G
        assert group.server == "server"
        assert group.started_at <= group.ended_at
        assert {span.policy for each in group.completions for span in each.spans} == {bench.queue.announced.identity}
    assert bench.groups("published") == 6
    assert bench.metrics.registry.get_sample_value("penstock_rollout_completion_tokens_total") == 6 * G * 3
    assert bench.metrics.registry.get_sample_value("penstock_rollout_prompt_tokens_total") == 6 * 2


async def test_nothing_is_taken_before_a_version_is_announced(bench: Bench) -> None:
    bench.queue.put(ticket(0))
    await asyncio.sleep(0.2)
    assert bench.queue.taken == []


async def test_a_server_that_is_behind_loads_before_it_takes(bench: Bench) -> None:
    bench.announce(1)
    await bench.until(lambda: bench.weights.identity is not None)
    bench.announce(2)
    bench.queue.put(ticket(0))
    await bench.until(lambda: bench.queue.published)
    (group,) = bench.queue.published
    assert group.completions[0].oldest_version == 2


async def test_a_new_lease_is_followed_even_to_a_lower_version(bench: Bench) -> None:
    bench.announce(5)
    await bench.until(lambda: bench.weights.identity is not None)
    bench.announce(2, lease=2)
    bench.queue.put(ticket(0))
    await bench.until(lambda: bench.queue.published)
    assert bench.queue.published[0].completions[0].oldest_version == 2


async def test_no_more_completions_run_than_the_engine_holds(bench: Bench) -> None:
    bench.fake.holds_at = 1
    for number in range(10):
        bench.queue.put(ticket(number))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_held == 4 * G)
    bench.fake.holds_at = -1
    await bench.until(lambda: len(bench.queue.published) == 10)
    assert bench.fake.max_running == 4 * G
    assert bench.queue.followed >= 6 - 4, "hand-overs do not take the next ticket"


async def test_malformed_tickets_are_buried(bench: Bench) -> None:
    bench.queue.put(ticket(0), payload=b"not a ticket")
    bench.announce(1)
    await bench.until(lambda: bench.queue.buried)
    assert "not a Ticket" in bench.queue.buried[0]


async def test_what_the_engine_refuses_counts_as_failed(bench: Bench) -> None:
    bench.queue.put(ticket(0, tokens=1000))
    bench.queue.put(ticket(1))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.returned) == 3 and bench.queue.published)
    assert bench.queue.returned == [("0", "failed")] * 3
    assert [group.ticket.number for group in bench.queue.published] == [1]


async def test_aborted_completions_are_never_published(bench: Bench) -> None:
    bench.fake.finish_reason = "abort"
    bench.queue.put(ticket(0))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.returned) == 3)
    assert bench.queue.published == []
    assert bench.groups("aborted") == 3


async def test_a_dead_engine_is_restarted_with_the_announced_weights(bench: Bench) -> None:
    bench.fake.holds_at = 1  # still running when it dies
    bench.queue.put(ticket(0))
    bench.queue.put(ticket(1))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_running == 2 * G)
    bench.server.die()
    bench.fake.holds_at = -1
    await bench.until(lambda: len(bench.queue.published) == 2)
    assert sorted(bench.queue.returned) == [("0", "engine_died"), ("1", "engine_died")]
    assert bench.server.num_starts == 2
    assert bench.queue.published[0].completions[0].oldest_version == 1


async def test_a_ticket_that_two_engines_died_with_runs_alone(bench: Bench) -> None:
    bench.fake.token_seconds = 0.05
    bench.queue.put(ticket(0))
    bench.queue.put(ticket(1), engine_deaths=2)
    bench.queue.put(ticket(2))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.published) == 3)
    assert bench.fake.max_running == G
    assert [group.ticket.number for group in bench.queue.published] == [0, 1, 2]


async def test_a_ticket_that_is_to_run_alone_and_comes_with_a_hand_over_runs_alone(bench: Bench) -> None:
    bench.fake.holds_at = 1
    for number in range(4):
        bench.queue.put(ticket(number, tokens=3 + number))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_running == 4 * G)
    bench.queue.put(ticket(4), engine_deaths=2)
    for number in range(5, 8):
        bench.queue.put(ticket(number))
    bench.fake.holds_at = -1
    await bench.until(lambda: len(bench.queue.published) == 8)
    assert ("4", "free") in bench.queue.returned
    alone, *others = sorted(bench.queue.published, key=lambda group: group.ticket.number != 4)
    assert all(each.ended_at <= alone.started_at or each.started_at >= alone.ended_at for each in others)


async def test_evaluation_takes_its_share_and_all_when_nothing_else_waits(bench: Bench) -> None:
    bench.fake.holds_at = 1
    for number in range(6):
        bench.queue.put(ticket(number))
        bench.queue.put(ticket(number, "eval"))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_running == 4 * G)
    assert sorted(bench.queue.taken) == ["0", "1", "2", "e0"]  # a quarter of four groups
    bench.fake.holds_at = -1
    await bench.until(lambda: len(bench.queue.published) == 12)


async def test_at_the_end_what_runs_is_finished(bench: Bench) -> None:
    bench.fake.holds_at = 1
    bench.queue.put(ticket(0))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_running)
    bench.stop.set()
    bench.fake.holds_at = -1
    await bench.until(lambda: bench.queue.published)


async def test_at_the_end_what_takes_too_long_is_given_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_rollout.producer.DRAIN_SECONDS", 0.1)
    bench.fake.holds_at = 1
    bench.queue.put(ticket(0))
    bench.announce(1)
    await bench.until(lambda: bench.fake.num_running)
    bench.stop.set()
    await bench.until(lambda: bench.queue.returned)
    assert bench.queue.returned == [("0", "free")]


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

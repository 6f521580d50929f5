"""The loop from tickets to groups of episodes, with fakes for the queue and for the episodes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest

from penstock.contracts import Episode, PolicyIdentity, Score, Ticket, encode
from penstock.contracts.services import Announcement
from penstock_agent.episodes.producer import Producer
from penstock_agent.episodes.room import Room
from penstock_agent.metrics import AgentMetrics
from tests.patience import ANSWER_SECONDS
from tests.unit.agent.episodes.agent_tickets import ENVIRONMENT, TicketsInMemory, agent_ticket, make_episode

Play = Callable[[Ticket, int], Awaitable[Episode]]


async def at_once(ticket: Ticket, index: int) -> Episode:
    return make_episode(float(ticket.number + index))


class Played:
    """Episodes by a rule; counts those that run."""

    def __init__(self, play: Play = at_once) -> None:
        self.play = play
        self.begun: list[tuple[str, int]] = []
        self.leases: set[int] = set()
        self.num_running = 0
        self.most_running = 0

    async def episode(self, ticket: Ticket, index: int, lease: int) -> Episode:
        self.begun.append((ticket.key, index))
        self.leases.add(lease)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await asyncio.sleep(0)
            return await self.play(ticket, index)
        finally:
            self.num_running -= 1


async def announced() -> Announcement | None:
    return Announcement(PolicyIdentity(0, "0" * 16), "path", lease=7)


@asynccontextmanager
async def producing(
    queue: TicketsInMemory,
    played: Played,
    *,
    sessions: int = 64,
    group_size: int = 3,
    metrics: AgentMetrics | None = None,
) -> AsyncIterator[Callable[[], Coroutine[None, None, None]]]:
    """A loop that runs; the block gets what ends it in order."""
    stop = asyncio.Event()
    room = Room(group_size, sessions, sessions // 2)
    producer = Producer(
        queue, announced, played, room, metrics or AgentMetrics(), environment=ENVIRONMENT, server="agent-1"
    )
    task = asyncio.create_task(producer.produce_groups(stop))

    async def end() -> None:
        stop.set()
        await task

    async with asyncio.timeout(ANSWER_SECONDS):
        try:
            yield end
        finally:
            task.cancel()
            await asyncio.wait({task})


def count(metrics: AgentMetrics, outcome: str) -> float | None:
    return metrics.registry.get_sample_value("penstock_agent_groups_total", {"outcome": outcome})


async def test_groups_have_an_episode_for_each_seed_in_order() -> None:
    async def slower_first(ticket: Ticket, index: int) -> Episode:
        await asyncio.sleep(0.003 * (3 - index))
        return make_episode(float(index)) if index != 1 else make_episode(Score(None, "crashed"), "failure")

    queue, played, metrics = TicketsInMemory(agent_ticket(0), agent_ticket(5, purpose="eval")), Played(), AgentMetrics()
    played.play = slower_first
    async with producing(queue, played, metrics=metrics) as end:
        await queue.idle.wait()
        await end()
    assert {*queue.handed_over} == {"0", "e5"}
    group = queue.handed_over["0"]
    assert (group.ticket, group.completions, group.server) == (agent_ticket(0), (), "agent-1")
    assert [episode.score.value for episode in group.episodes] == [0.0, None, 2.0]
    assert group.started_at <= group.ended_at
    assert played.leases == {7}
    assert queue.kept == {}
    assert count(metrics, "published") == 2


async def test_calls_need_no_version_that_the_trainer_has_gone_back_behind() -> None:
    """At version 0 of lease 7, a ticket of version 3 was issued under an earlier lease."""
    queue, played = TicketsInMemory(agent_ticket(0, policy_version=3)), Played()
    async with producing(queue, played) as end:
        await queue.idle.wait()
        await end()
    assert played.leases == {6}


async def test_only_what_is_missing_is_made() -> None:
    kept = {"0": {1: encode(make_episode(0.25)), 2: b"\xc1 of another release"}}
    queue, played, metrics = TicketsInMemory(agent_ticket(0), kept=kept), Played(), AgentMetrics()
    async with producing(queue, played, metrics=metrics) as end:
        await queue.idle.wait()
        await end()
    assert sorted(played.begun) == [("0", 0), ("0", 2)]
    assert [episode.score.value for episode in queue.handed_over["0"].episodes] == [0.0, 0.25, 2.0]
    assert metrics.registry.get_sample_value("penstock_agent_episodes_kept_total") == 1


async def test_malformed_tickets_and_those_of_another_environment_are_buried() -> None:
    completions = agent_ticket(1, environment="", prompt_ids=b"\0\0\0\0")
    queue = TicketsInMemory(b"\xc1", completions, agent_ticket(2, environment="other:Env"), agent_ticket(3))
    async with producing(queue, Played()) as end:
        await queue.idle.wait()
        await end()
    assert {*queue.buried} == {"0", "1", "2"}
    assert "this service has 'my_envs:Guess'" in queue.buried["1"]
    assert "other:Env" in queue.buried["2"]
    assert {*queue.handed_over} == {"3"}


async def test_no_more_episodes_run_than_there_are_sessions() -> None:
    queue, played = TicketsInMemory(*(agent_ticket(number) for number in range(8))), Played()
    async with producing(queue, played, sessions=7) as end:
        await queue.idle.wait()
        await end()
    assert len(queue.handed_over) == 8
    assert played.most_running <= 7
    assert played.most_running > 3, "groups ran one after the other"


async def test_a_group_that_is_larger_than_the_sessions_runs_in_waves() -> None:
    queue, played = TicketsInMemory(agent_ticket(0, 8), agent_ticket(1, 8)), Played()
    async with producing(queue, played, sessions=3, group_size=8) as end:
        await queue.idle.wait()
        await end()
    assert [len(group.episodes) for group in queue.handed_over.values()] == [8, 8]
    assert played.most_running == 3


async def test_at_the_end_what_has_not_ended_is_given_back_and_the_rest_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock_agent.episodes.producer.DRAIN_SECONDS", 0.05)
    hangs = asyncio.Event()

    async def one_hangs(ticket: Ticket, index: int) -> Episode:
        if index == 1:
            hangs.set()
            await asyncio.Event().wait()
        return make_episode(float(index))

    queue, played, metrics = TicketsInMemory(agent_ticket(0)), Played(one_hangs), AgentMetrics()
    async with producing(queue, played, metrics=metrics) as end:
        await hangs.wait()
        while len(queue.kept.get("0", {})) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await end()
    assert queue.given_back == ["0"]
    assert {*queue.kept["0"]} == {0, 2}
    assert played.num_running == 0
    assert count(metrics, "returned") == 1


async def test_what_ends_in_time_is_handed_over_after_the_stop() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def waits(ticket: Ticket, index: int) -> Episode:
        begun.set()
        await go_on.wait()
        return make_episode()

    queue = TicketsInMemory(agent_ticket(0))
    async with producing(queue, Played(waits)) as end:
        await begun.wait()
        ending = asyncio.create_task(end())
        await asyncio.sleep(0.01)
        go_on.set()
        await ending
    assert {*queue.handed_over} == {"0"}
    assert queue.given_back == []


async def test_a_ticket_that_another_worker_has_taken_over_is_left_to_it() -> None:
    running, metrics = asyncio.Event(), AgentMetrics()

    async def one_hangs(ticket: Ticket, index: int) -> Episode:
        if index == 2:
            running.set()
            await asyncio.Event().wait()
        await running.wait()
        return make_episode()

    queue, played = TicketsInMemory(agent_ticket(0)), Played(one_hangs)
    queue.late.add("0")
    async with producing(queue, played, metrics=metrics) as end:
        while not queue.forgotten:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert played.num_running == 0, "its other episodes go on for nobody"
        await end()
    assert queue.handed_over == {}
    assert queue.given_back == []
    assert count(metrics, "late") == 1


async def test_the_end_cuts_a_long_wait_for_tickets_short() -> None:
    queue = TicketsInMemory()
    queue.ask_seconds = 1e6
    async with producing(queue, Played()) as end:
        await queue.idle.wait()
        await end()

"""Attempts at an episode: what ends them, what is tried again, and what becomes of the session; with fakes around."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest

from penstock.config.agent import AgentSection
from penstock.contracts import EpisodeCounts, Node, Score, Ticket
from penstock.contracts.vocabulary import Cut
from penstock_agent.capture.messages import Message
from penstock_agent.environments.episode import ChatSession, Ending, EpisodeCutError, unfitting
from penstock_agent.episodes import attempts as module
from penstock_agent.episodes.attempts import Attempts, row_of
from penstock_agent.episodes.breaker import LIMIT, Breaker
from penstock_agent.episodes.watch import Watch
from penstock_agent.gateway import refusals
from penstock_agent.gateway.answers import ChatAnswer
from penstock_agent.gateway.requests import ChatRequest
from penstock_agent.generation.waits import Waits
from penstock_agent.metrics import AgentMetrics
from tests.patience import ANSWER_SECONDS
from tests.unit.agent.episodes.agent_tickets import NODES, agent_ticket

Row = dict[str, Any]
Play = Callable[[Row, ChatSession], Awaitable[Ending]]
DONE = Ending(Score(1.0), "done")


class FakeSession:
    """A conversation with a model that answers at once, and after `num_answers` never."""

    def __init__(self, name: str, *, num_answers: int = 10**6) -> None:
        self.name = name
        self.num_answers = num_answers
        self.is_open = True
        self.reward: float | None = None
        self.end: Cut | None = None
        self.key, self.own_base_url = "psk_1", "http://agent/s/psk_1/v1"
        self.num_turns = 0
        self.waits = Waits()
        self.asked_tools: tuple[str, ...] = ()
        self.max_turns = 8
        self._ended = asyncio.Event()

    def end_turns(self) -> None:
        self.end = "max_turns"
        self._ended.set()

    async def chat(self, request: ChatRequest) -> ChatAnswer:
        assert self.is_open
        if self.num_turns >= self.max_turns:
            self.end_turns()
        elif self.num_turns >= self.num_answers:
            await self._ended.wait()
        if self.end is not None:
            raise refusals.EpisodeCutError(self.end, "too many")
        self.num_turns += 1
        return ChatAnswer(
            id="1",
            created=0,
            message={"role": "assistant", "content": "7"},
            finish_reason="stop",
            token_ids=b"",
            logprobs=b"",
            num_prompt_tokens=2,
            num_cached_tokens=0,
        )

    def nodes(self) -> tuple[Node, ...]:
        return NODES if self.num_turns else ()

    def counts(self) -> EpisodeCounts:
        return EpisodeCounts(num_turns=self.num_turns, num_failed_tool_calls=1)

    def transcript(self) -> str:
        return f"transcript of {self.name}"


class FakeSessions:
    """Opens sessions; knows all that there ever were."""

    def __init__(self, *, num_answers: int = 10**6) -> None:
        self.opened: list[FakeSession] = []
        self._num_answers = num_answers

    @asynccontextmanager
    async def open(self, ticket: Ticket, *, episode: int, attempt: int, lease: int) -> AsyncIterator[FakeSession]:
        session = FakeSession(f"{ticket.key}/{episode}/{attempt}/{lease}", num_answers=self._num_answers)
        self.opened.append(session)
        try:
            yield session
        finally:
            session.is_open = False


class FakeDriver:
    """An environment by a rule."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.rows: list[Row] = []
        self.num_running = 0

    async def run(self, row: Row, session: ChatSession) -> Ending:
        self.rows.append(row)
        self.num_running += 1
        try:
            return await self.play(row, session)
        finally:
            self.num_running -= 1


async def ask(session: ChatSession) -> Message:
    return await session.chat([{"role": "user", "content": "3+4="}], [])


class World:
    """Attempts with all that they need."""

    def __init__(
        self, play: Play, *, num_answers: int = 10**6, away_seconds: Callable[[], float] = lambda: 0.0, **section: Any
    ) -> None:
        self.sessions = FakeSessions(num_answers=num_answers)
        self.driver = FakeDriver(play)
        self.metrics = AgentMetrics()
        self.breaker = Breaker(self.metrics.breaker_changed)
        self.watch = Watch()
        given = AgentSection(environment="my_envs:Guess", **section)
        self.attempts = Attempts(
            given, self.sessions, self.driver, self.breaker, self.watch, self.metrics, away_seconds
        )

    def sample(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"penstock_agent_{name}", labels)


@pytest.fixture(autouse=True)
def _no_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACK_OFF_SECONDS", 0.001)


async def test_an_episode_is_what_was_recorded_with_the_score_of_the_environment() -> None:
    async def play(row: Row, session: ChatSession) -> Ending:
        assert (session.name, session.api_key) == ("5/1", "psk_1")
        assert session.base_url == "http://agent/s/psk_1/v1"
        assert await ask(session) == {"role": "assistant", "content": "7"}
        assert session.num_turns == 1
        return Ending(Score(0.5), "done", num_failed_tool_calls=2)

    world = World(play)
    episode = await world.attempts.episode(agent_ticket(5, metadata={"prompt": "3+4=", "level": 1}), 1, lease=3)
    assert (episode.nodes, episode.score, episode.end) == (NODES, Score(0.5), "done")
    assert episode.counts == EpisodeCounts(num_turns=1, num_failed_tool_calls=3, num_attempts=1)
    assert episode.text == "transcript of 5/1/0/3"
    assert episode.ended_at >= episode.started_at > 0
    assert world.driver.rows == [{"prompt": "3+4=", "answer": "7", "level": 1}]
    assert not world.sessions.opened[0].is_open
    assert (world.sample("episodes_total", end="done"), world.sample("tokens_total", kind="sampled")) == (1, 1)


def test_the_text_for_people_is_no_prompt() -> None:
    assert row_of(agent_ticket(0, prompt="level: 1")) == {"answer": "7", "level": 1}


async def test_a_failure_is_tried_again_with_a_fresh_session_and_then_has_no_score() -> None:
    async def play(row: Row, session: ChatSession) -> Ending:
        await ask(session)
        return Ending(Score(None, "the tool crashed"), "failure")

    world = World(play, max_attempts=3)
    episode = await world.attempts.episode(agent_ticket(0), 0, lease=1)
    assert [session.name for session in world.sessions.opened] == ["0/0/0/1", "0/0/1/1", "0/0/2/1"]
    assert not any(session.is_open for session in world.sessions.opened)
    assert (episode.score, episode.end, episode.nodes) == (Score(None, "the tool crashed"), "failure", ())
    assert episode.counts.num_attempts == 3
    assert episode.text == "transcript of 0/0/2/1"
    assert world.sample("failures_total", kind="failure") == world.sample("attempts_total") == 3


async def test_what_no_attempt_can_change_is_not_tried_again_and_opens_no_breaker() -> None:
    """Rows whose first call is too long are the rows' fault, however many there are."""

    async def play(row: Row, session: ChatSession) -> Ending:
        return Ending(unfitting("max_tokens"), "max_tokens")

    world = World(play, max_attempts=3)
    episodes = [await world.attempts.episode(agent_ticket(number), 0, lease=1) for number in range(2 * LIMIT)]
    assert {(episode.end, episode.counts.num_attempts) for episode in episodes} == {("max_tokens", 1)}
    assert not any(episode.nodes or episode.score.value is not None for episode in episodes)
    assert not world.breaker.is_open


async def test_a_later_attempt_counts_those_before_it() -> None:
    outcomes = [Ending(Score(None, "crashed"), "failure"), DONE]

    async def play(row: Row, session: ChatSession) -> Ending:
        await ask(session)
        return outcomes.pop(0)

    episode = await World(play).attempts.episode(agent_ticket(0), 0, lease=1)
    assert (episode.score, episode.counts.num_attempts) == (Score(1.0), 2)


@pytest.mark.parametrize("fault", ["raises", "no call"])
async def test_a_defect_and_an_episode_without_a_call_are_failures(fault: str) -> None:
    async def play(row: Row, session: ChatSession) -> Ending:
        if fault == "raises":
            raise KeyError("x")
        return DONE

    episode = await World(play, max_attempts=1).attempts.episode(agent_ticket(0), 0, lease=1)
    expected = "KeyError" if fault == "raises" else "without an answer of the model"
    assert (episode.end, episode.score.value) == ("failure", None)
    assert expected in episode.score.failure


async def test_a_limit_ends_the_driver_as_its_own_error() -> None:
    async def play(row: Row, session: ChatSession) -> Ending:
        for _ in range(8):
            await ask(session)
        with pytest.raises(EpisodeCutError) as caught:
            await ask(session)
        assert caught.value.cut == session.cut == "max_turns"
        return Ending(Score(0.0), "max_turns")

    episode = await World(play).attempts.episode(agent_ticket(0), 0, lease=1)
    assert (episode.end, episode.counts.num_turns) == ("max_turns", 8)


async def hang(row: Row, session: ChatSession) -> Ending:
    await ask(session)
    await asyncio.Event().wait()
    raise AssertionError("never")


async def test_an_attempt_that_takes_too_long_is_a_failure_and_leaves_nothing() -> None:
    world = World(hang, timeout_seconds=0.1, max_attempts=2)
    async with asyncio.timeout(ANSWER_SECONDS):
        episode = await world.attempts.episode(agent_ticket(0), 0, lease=1)
    assert episode.end == "timeout"
    assert episode.score.failure == "no end after 0.1 s (agent.timeout_seconds)"
    assert (len(world.sessions.opened), world.driver.num_running, world.watch.num_running) == (2, 0, 0)
    assert not any(session.is_open for session in world.sessions.opened)
    assert world.sample("failures_total", kind="timeout") == 2


@pytest.mark.parametrize("waits_for", ["model", "environment"])
async def test_or_it_is_scored_so_that_a_model_that_never_ends_can_be_punished(
    waits_for: Literal["model", "environment"],
) -> None:
    async def for_the_model(row: Row, session: ChatSession) -> Ending:
        try:
            while True:
                await ask(session)
                await asyncio.sleep(0.02)
        except EpisodeCutError:
            return Ending(Score(-0.5), "max_turns")

    world = World(
        for_the_model if waits_for == "model" else hang,
        timeout_seconds=0.1,
        on_timeout="score",
        cut_score=-1.0,
        call_timeout_seconds=0.1 if waits_for == "environment" else ANSWER_SECONDS,
        max_turns=10**6,
    )
    world.sessions.opened.clear()
    async with asyncio.timeout(ANSWER_SECONDS):
        episode = await world.attempts.episode(agent_ticket(0), 0, lease=1)
    assert (episode.end, episode.score) == ("timeout", Score(-0.5 if waits_for == "model" else -1.0))
    assert len(world.sessions.opened) == 1
    assert world.driver.num_running == 0


@pytest.mark.parametrize(("num_answers", "score", "num_attempts"), [(1, -0.5, 1), (0, None, 2)])
async def test_a_call_without_an_answer_ends_at_the_deadline_too(
    num_answers: int, score: float | None, num_attempts: int
) -> None:
    """Without any answer there is nothing to punish: the episode is tried again."""

    async def play(row: Row, session: ChatSession) -> Ending:
        try:
            while True:
                await ask(session)
        except EpisodeCutError as error:
            return Ending(Score(-0.5) if session.num_turns else unfitting(error.cut), error.cut)

    world = World(
        play,
        num_answers=num_answers,
        timeout_seconds=0.05,
        on_timeout="score",
        call_timeout_seconds=ANSWER_SECONDS,
        max_attempts=2,
    )
    async with asyncio.timeout(ANSWER_SECONDS):
        episode = await world.attempts.episode(agent_ticket(0), 0, lease=1)
    assert (episode.end, episode.score.value) == ("timeout", score)
    assert episode.counts.num_attempts == num_attempts
    if score is None:
        assert episode.score.failure == "no end after 0.05 s (agent.timeout_seconds)"


async def test_time_in_which_no_server_could_answer_does_not_count() -> None:
    release = asyncio.Event()

    async def play(row: Row, session: ChatSession) -> Ending:
        await ask(session)
        await release.wait()
        return DONE

    world = World(play, away_seconds=time.monotonic, timeout_seconds=0.2, max_attempts=1)
    making = asyncio.create_task(world.attempts.episode(agent_ticket(0), 0, lease=1))
    await asyncio.sleep(0.6)
    assert not making.done()
    release.set()
    assert (await making).score == Score(1.0)


@pytest.mark.parametrize("when", ["playing", "waiting for the breaker"])
async def test_cancelled_at_any_point_it_leaves_nothing(when: str) -> None:
    world = World(hang)
    if when != "playing":
        for number in range(32):
            world.breaker.failed(f"other {number % 4}", "away")
    making = asyncio.create_task(world.attempts.episode(agent_ticket(0), 0, lease=1))
    while not (world.driver.num_running if when == "playing" else world.breaker.num_waiting):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    making.cancel()
    async with asyncio.timeout(ANSWER_SECONDS):
        with pytest.raises(asyncio.CancelledError):
            await making
    assert (world.driver.num_running, world.watch.num_running, world.breaker.num_waiting) == (0, 0, 0)
    assert not any(session.is_open for session in world.sessions.opened)


async def test_an_outage_uses_up_few_attempts_and_the_rest_goes_on_when_it_ends() -> None:
    works = False

    async def play(row: Row, session: ChatSession) -> Ending:
        await ask(session)
        return DONE if works else Ending(Score(None, "the sandbox is away"), "failure")

    world = World(play, max_attempts=4)
    world.breaker = Breaker(world.metrics.breaker_changed, limit=8, cool_down_seconds=0.05)
    world.attempts._breaker = world.breaker
    making = [
        asyncio.create_task(world.attempts.episode(agent_ticket(number), index, lease=1))
        for number in range(4)
        for index in range(8)
    ]
    async with asyncio.timeout(ANSWER_SECONDS):
        while not world.breaker.is_open:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.3)
        assert world.sample("breaker_open") == 1
        assert len(world.sessions.opened) <= 32 + 8, "the outage uses up attempts"
        works = True
        episodes = await asyncio.gather(*making)
    assert all(episode.score == Score(1.0) for episode in episodes)
    assert world.sample("breaker_open") == 0

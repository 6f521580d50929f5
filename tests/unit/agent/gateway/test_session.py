"""The session of an episode: its calls, its limits, its end."""

import asyncio
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from penstock.contracts import EpisodeCounts, Sampling
from penstock.errors import CallRefusedError
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.gateway.refusals import (
    ContextTooLongError,
    EpisodeCutError,
    KeyRefusedError,
    SessionClosedError,
)
from penstock_agent.gateway.requests import ChatRequest
from penstock_agent.gateway.session import Session
from penstock_agent.gateway.sessions import NUM_ENDED
from penstock_agent.generation.call import CallRejectedError
from tests.patience import ANSWER_SECONDS
from tests.unit.agent.gateway.pretend import END, TOOL, LetterRendering, PretendGateway, check_record, ids_of


def request(*texts: str, **changed: Any) -> ChatRequest:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return ChatRequest(messages, **{"tools": [], **changed})


async def test_turns_continue_the_exact_tokens_of_those_before() -> None:
    gateway = PretendGateway()
    async with gateway.open() as session:
        first = await session.chat(request("a"))
        await session.chat(request("a", first.message["content"], "b"))
    check_record(session, gateway.servers)
    one, two = gateway.servers.answered
    assert two[0].prompt_ids.startswith(one[0].prompt_ids + one[1].token_ids)
    assert [node.role for node in session.nodes()] == ["user", "assistant", "user", "assistant"]
    assert (session.num_turns, session.counts().num_turns) == (2, 2)


async def test_what_an_engine_is_asked_is_the_tickets() -> None:
    gateway = PretendGateway()
    async with gateway.open(sampling=Sampling(0.5, 20, (9,))) as session:
        await session.chat(request("a"))
        await session.chat(request("b", max_new_tokens=4))
        await session.chat(request("c", max_new_tokens=400))
    assert [call.sampling.max_new_tokens for call in gateway.servers.calls] == [20, 4, 20]
    call = gateway.servers.calls[0]
    assert call.sampling == Sampling(0.5, 20, (9, END))
    assert (call.session, call.at_least_number, call.at_least_lease) == ("12", 3, 5)


async def test_one_turn_too_many_ends_the_episode() -> None:
    gateway = PretendGateway(max_turns=2)
    async with gateway.open() as session:
        await session.chat(request("a"))
        await session.chat(request("b"))
        await session.chat(request("title", auxiliary=True))
        assert session.end is None
        for text in "cd":
            with pytest.raises(EpisodeCutError, match=r"agent\.max_turns") as caught:
                await session.chat(request(text))
            assert caught.value.end == session.end == "max_turns"
    assert len(gateway.servers.calls) == 3


async def test_the_end_of_all_turns_ends_the_call_that_runs() -> None:
    gateway = PretendGateway()
    async with gateway.open() as session:
        await session.chat(request("a"))
        gateway.servers.gate.clear()
        asking = asyncio.create_task(session.chat(request("b")))
        async with asyncio.timeout(ANSWER_SECONDS):
            while len(gateway.servers.calls) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
            session.end_turns()
            with pytest.raises(EpisodeCutError, match=r"agent\.max_turns"):
                await asking
        with pytest.raises(EpisodeCutError, match=r"agent\.max_turns"):
            await session.chat(request("b"))
        session.set_reward(0.5)
        assert (session.end, session.num_turns, gateway.servers.num_cancelled) == ("max_turns", 1, 1)
    check_record(session, gateway.servers)


async def test_a_call_that_does_not_fit_ends_the_episode() -> None:
    gateway = PretendGateway(max_tokens=100)
    async with gateway.open(sampling=Sampling(1.0, 40, ())) as session:
        await session.chat(request("a" * 30))
        with pytest.raises(ContextTooLongError, match=r"agent\.max_tokens"):
            await session.chat(request("a" * 50, auxiliary=True))
        await session.chat(request("a" * 50, max_new_tokens=10))  # its answer is shorter, so that it fits
        with pytest.raises(EpisodeCutError, match="up to 40 of answer are more than 100"):
            await session.chat(request("a" * 50))
        assert session.end == "max_tokens"


class WatchedRendering(LetterRendering):
    """Refuses to render what is far too long; runs of one letter are one token."""

    def count(self, text: str) -> int:
        assert len(text) <= 8 * 100
        return len(text) if "b" in text else 1

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        assert not any("b" in message["content"] and len(message["content"]) > 800 for message in messages)
        return ids_of("a")


async def test_a_message_of_megabytes_is_cut_by_its_beginning() -> None:
    gateway = PretendGateway(max_tokens=100, rendering=WatchedRendering())
    async with gateway.open(sampling=Sampling(1.0, 40, ())) as session:
        await session.chat(request("a" * 1_000_000))  # long, but of few tokens
        with pytest.raises(ContextTooLongError, match=r"one message alone has more than 100 tokens"):
            await session.chat(request("ab" * 500_000, auxiliary=True))
        assert session.end is None
        with pytest.raises(EpisodeCutError, match=r"one message alone has more than 100 tokens \(agent\.max_tokens\)"):
            await session.chat(request("ab" * 500_000))
        assert session.end == "max_tokens"
    assert len(gateway.servers.calls) == 1


async def test_calls_that_fail_cost_no_turn_and_no_seed() -> None:
    gateway = PretendGateway(max_turns=1)
    async with gateway.open() as session:
        gateway.servers.failures = [CallRejectedError("too long"), ZeroDivisionError()]
        with pytest.raises(CallRefusedError, match="too long"):
            await session.chat(request("a"))
        with pytest.raises(ZeroDivisionError):
            await session.chat(request("a"))
        await session.chat(request("a"))
    assert len({call.seed for call in gateway.servers.calls}) == 1
    check_record(session, gateway.servers)


async def test_the_end_of_a_session_ends_its_calls() -> None:
    gateway = PretendGateway()
    gateway.servers.gate.clear()
    async with gateway.open() as session:
        waiting = asyncio.create_task(session.chat(request("a")))
        await gateway.servers.begun.wait()
        unbegun = session.ask(request("b"))  # its task has not had its first step
    for each in (waiting, unbegun.answer):
        with pytest.raises(SessionClosedError):
            async with asyncio.timeout(ANSWER_SECONDS):
                await each
    with pytest.raises(SessionClosedError):
        await session.chat(request("a"))
    with pytest.raises(SessionClosedError):
        session.set_reward(1.0)
    assert (gateway.servers.num_cancelled, session._tasks, session.nodes()) == (1, set(), ())


async def test_an_error_in_the_block_leaves_it_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with PretendGateway().open():
            raise ZeroDivisionError
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01), PretendGateway().open():
            await asyncio.sleep(ANSWER_SECONDS)


async def test_a_call_goes_on_without_its_client_and_answers_the_next() -> None:
    gateway = PretendGateway()
    gateway.servers.gate.clear()
    async with gateway.open() as session:
        first = asyncio.create_task(session.chat(request("a")))
        await gateway.servers.begun.wait()
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.create_task(session.chat(request("a")))
        await asyncio.sleep(0)
        gateway.servers.gate.set()
        answer = await second
        sibling = await session.chat(request("a"))
    assert answer.message != sibling.message
    assert (len(gateway.servers.calls), gateway.counts.num_repeated) == (2, 1)
    check_record(session, gateway.servers)
    assert session.counts().branches == {"sibling": 1}


async def test_two_that_ask_the_same_at_once_draw_two_answers() -> None:
    gateway = PretendGateway()
    async with gateway.open() as session:
        one, two = await asyncio.gather(session.chat(request("a")), session.chat(request("a")))
    assert one.message != two.message
    check_record(session, gateway.servers)


async def test_an_answer_that_reached_nobody_is_not_trained() -> None:
    gateway = PretendGateway()
    async with gateway.open() as session:
        lost = session.ask(request("a"))
        answer = await lost.answer
        await session.chat(request("b"))
        assert [node.is_trained for node in session.nodes() if node.is_sampled] == [False, True]
        # A client that goes on from it has read it, whatever the connection seemed to say.
        await session.chat(request("a", answer.message["content"], "go on"))
        assert all(node.is_trained for node in session.nodes() if node.is_sampled)


@pytest.mark.parametrize("trained", [False, True])
async def test_auxiliary_calls_are_trained_only_on_demand(trained: bool) -> None:
    gateway = PretendGateway(train_auxiliary=trained)
    async with gateway.open() as session:
        await session.chat(request("title", auxiliary=True))
        await session.chat(request("a"))
    assert [node.is_trained for node in session.nodes() if node.is_sampled] == [trained, True]
    assert session.counts().num_auxiliary == 1
    assert session.num_turns == 1


async def test_seeds_do_not_depend_on_when_calls_come() -> None:
    async def seeds(*texts: str) -> dict[str, list[int]]:
        gateway = PretendGateway()
        async with gateway.open() as session:
            for text in texts:
                await session.chat(request(text))
        drawn: dict[str, list[int]] = {}
        for text, call in zip(texts, gateway.servers.calls, strict=True):
            drawn.setdefault(text, []).append(call.seed)
        return drawn

    assert await seeds("a", "b", "a") == await seeds("a", "a", "b") == await seeds("b", "a", "a")


async def test_the_last_reward_counts() -> None:
    async with PretendGateway().open() as session:
        assert session.reward is None
        session.set_reward(0.5)
        session.set_reward(1)
        assert session.reward == 1.0


async def test_keys_find_their_own_session_or_none() -> None:
    gateway = PretendGateway()
    async with gateway.open() as one, gateway.open() as two:
        assert gateway.sessions.find(one.key) is one
        assert gateway.sessions.find(two.key) is two
    with pytest.raises(SessionClosedError, match="an episode that has ended: 12-0-0-0"):
        gateway.sessions.find(one.key)
    for key, why in (
        ("psk_" + 40 * "0", "no episode"),
        ("", "no key"),
    ):
        with pytest.raises(KeyRefusedError, match=why):
            gateway.sessions.find(key)
    with pytest.raises(KeyRefusedError, match="another form") as caught:
        gateway.sessions.find("sk-my-secret")
    assert "my-secret" not in str(caught.value)


async def test_nothing_is_kept_of_sessions_that_have_ended_but_some_keys() -> None:
    gateway = PretendGateway()
    ended: list[weakref.ref[Session]] = []
    for _ in range(NUM_ENDED + 10):
        async with gateway.open() as session:
            if len(ended) < 10:
                await session.chat(request("a"))
            ended.append(weakref.ref(session))
    last_key = session.key
    del session
    gc.collect()
    assert [each for each in ended if each() is not None] == []
    assert len(gateway.sessions._ended) == NUM_ENDED
    with pytest.raises(SessionClosedError, match="has ended"):
        gateway.sessions.find(last_key)


async def test_a_session_has_two_addresses() -> None:
    async with PretendGateway("http://h:1").open() as session:
        assert session.base_url == "http://h:1/v1"
        assert session.own_base_url == f"http://h:1/s/{session.key}/v1"


async def test_what_an_episode_waits_for() -> None:
    gateway = PretendGateway()
    async with gateway.open() as session:
        gateway.servers.reply = lambda prompt, call: '<call>{"name": "add", "arguments": {}}</call>'
        gateway.servers.gate.clear()
        asking = asyncio.create_task(session.chat(request("a", tools=[TOOL])))
        await gateway.servers.begun.wait()
        assert (session.waits.num_waiting, session.num_turns, session.asked_tools) == (1, 0, ())
        gateway.servers.gate.set()
        await asking
        assert (session.waits.num_waiting, session.num_turns, session.asked_tools) == (0, 1, ("add",))
        await session.chat(request("title", auxiliary=True))
        assert (session.num_turns, session.asked_tools) == (1, ("add",))
        await session.chat(request("b"))
        assert (session.num_turns, session.asked_tools) == (2, ())


async def test_usage_adds_up() -> None:
    gateway = PretendGateway()
    async with gateway.open() as session:
        answers = [await session.chat(request(text, tools=[TOOL])) for text in "ab"]
    counts = session.counts()
    assert isinstance(counts, EpisodeCounts)
    assert counts.num_prompt_tokens == sum(each.num_prompt_tokens for each in answers) > 0
    assert counts.num_cached_tokens == sum(each.num_cached_tokens for each in answers) > 0

"""The gateway with OpenAI's own client, unmodified."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from penstock.contracts import Sampling
from penstock_agent.gateway.session import Session
from tests.integration.agent.gateway.serving import TOKEN, Cut, CuttingProxy, serving
from tests.patience import ANSWER_SECONDS
from tests.unit.agent.gateway.pretend import TOOL, check_record

HELLO: Any = [{"role": "user", "content": "Hello"}]


def client_of(session: Session, **options: Any) -> AsyncOpenAI:
    return AsyncOpenAI(
        **{"base_url": session.base_url, "api_key": session.key, "timeout": ANSWER_SECONDS, "max_retries": 0, **options}
    )


def through(proxy_url: str, session: Session, **options: Any) -> AsyncOpenAI:
    return client_of(session, base_url=f"{proxy_url}/v1", max_retries=2, **options)


async def test_a_plain_chat() -> None:
    async with serving() as gateway, gateway.open() as session, client_of(session) as client:
        answer = await client.chat.completions.create(model="any", messages=HELLO, logprobs=True, user="me", seed=4)
        choice = answer.choices[0]
        assert (choice.message.role, choice.finish_reason, answer.model) == ("assistant", "stop", "tiny")
        content = choice.message.content or ""
        assert choice.logprobs is not None
        assert "".join(token.token for token in choice.logprobs.content or ()) == content + "<end>"
        assert [token.logprob for token in choice.logprobs.content or ()][-1] == -3 / 128
        usage = answer.usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        sent = gateway.servers.calls[0].prompt_ids
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(sent) // 4, len(content) + 1)
        assert usage.prompt_tokens_details.cached_tokens == len(sent) // 8
        longer: Any = [*HELLO, choice.message, *HELLO]
        await client.chat.completions.create(model="any", messages=longer)
    check_record(session, gateway.servers)
    assert [node.role for node in session.nodes()] == ["user", "assistant", "user", "assistant"]


async def test_a_synchronous_client_with_the_key_in_its_address() -> None:
    def ask(base_url: str) -> str | None:
        with OpenAI(base_url=base_url, api_key="EMPTY", max_retries=0, timeout=ANSWER_SECONDS) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
            assert client.models.retrieve("tiny").owned_by == "penstock"
            with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
                client.models.retrieve("other")
            return client.chat.completions.create(model="tiny", messages=HELLO).choices[0].message.content

    async with serving() as gateway, gateway.open() as session:
        assert await asyncio.to_thread(ask, session.own_base_url)
    check_record(session, gateway.servers)


async def test_parallel_tool_calls() -> None:
    written = '<call>{"name": "add", "arguments": {"x": 1}}</call><call>{"name": "add", "arguments": {"x": 2}}</call>'
    asked: Any = {"model": "any", "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}
    room = Sampling(1.0, 1000, ())
    async with serving() as gateway, gateway.open(sampling=room) as session, client_of(session) as client:
        gateway.servers.reply = lambda prompt, call: "done" if "tool: " in prompt else written
        first = (await client.chat.completions.create(messages=HELLO, **asked)).choices[0]
        assert first.finish_reason == "tool_calls"
        calls = first.message.tool_calls or []
        assert [json.loads(call.function.arguments) for call in calls if call.type == "function"] == [
            {"x": 1},
            {"x": 2},
        ]
        results = [{"role": "tool", "tool_call_id": call.id, "content": f"{call.id} is 3"} for call in calls]
        longer: Any = [*HELLO, first.message, *results]
        last = await client.chat.completions.create(messages=longer, **asked)
        assert last.choices[0].message.content == "done"
        cut = await client.chat.completions.create(messages=HELLO, max_tokens=5, **asked)
        assert (cut.choices[0].finish_reason, cut.choices[0].message.content) == ("length", "<call")
    check_record(session, gateway.servers)
    assert [node.role for node in session.nodes()] == ["user", "assistant", "tool", "assistant", "assistant"]
    assert session.counts().num_tool_calls == 2


async def test_streaming() -> None:
    async with serving(keep_alive_seconds=0.01) as gateway, gateway.open() as session, client_of(session) as client:
        gateway.servers.gate.clear()
        asking = asyncio.create_task(
            client.chat.completions.create(
                model="any", messages=HELLO, stream=True, stream_options={"include_usage": True}, logprobs=True
            )
        )
        stream = await asking  # headers come with the first sign of life, before the model is done
        gateway.servers.gate.set()
        chunks = [chunk async for chunk in stream]
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        call, generated = gateway.servers.answered[0]
        assert content == gateway.servers.reply("", call)
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(generated.token_ids) // 4
        again = await client.chat.completions.create(model="any", messages=HELLO, stream=True)
        assert [chunk async for chunk in again]
    check_record(session, gateway.servers)
    assert session.counts().branches == {"sibling": 1}  # the first was delivered


async def test_an_error_in_a_stream_is_raised_by_the_client() -> None:
    async with serving(keep_alive_seconds=0.01) as gateway, gateway.open() as session, client_of(session) as client:
        gateway.servers.gate.clear()
        gateway.servers.failures = [ZeroDivisionError()]
        stream = await client.chat.completions.create(model="any", messages=HELLO, stream=True)
        gateway.servers.gate.set()
        with pytest.raises(openai.APIError, match="failed by a defect"):
            async for _ in stream:
                pass


async def test_a_time_out_and_the_clients_own_retry_are_one_call() -> None:
    async with serving() as gateway, gateway.open() as session:
        gateway.servers.gate.clear()
        async with client_of(session, timeout=1.0, max_retries=20) as client:
            asking = asyncio.create_task(client.chat.completions.create(model="any", messages=HELLO))
            async with asyncio.timeout(ANSWER_SECONDS):
                while gateway.counts.num_repeated < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            gateway.servers.gate.set()
            answer = await asking
    (call, _) = gateway.servers.answered[0]
    assert answer.choices[0].message.content == gateway.servers.reply("", call)
    assert len(gateway.servers.calls) == 1
    check_record(session, gateway.servers)
    assert all(node.is_trained for node in session.nodes() if node.is_sampled)


@pytest.mark.parametrize("cut", ["during the wait", "after the answer"])
async def test_a_lost_answer_is_given_again(cut: Cut) -> None:
    async with serving() as gateway, gateway.open() as session:
        proxy = CuttingProxy(session.base_url, cut)
        async with proxy.listening() as url, through(url, session) as client:
            answer = await client.chat.completions.create(model="any", messages=HELLO)
            (call, _) = gateway.servers.answered[0]
            assert answer.choices[0].message.content == gateway.servers.reply("", call)
            assert (len(gateway.servers.calls), gateway.counts.num_repeated) == (1, 1)
            sibling = await client.chat.completions.create(model="any", messages=HELLO)
            assert sibling.choices[0].message.content != answer.choices[0].message.content
    check_record(session, gateway.servers)
    assert [node.is_trained for node in session.nodes() if node.is_sampled] == [True, True]


async def test_a_cancelled_request_is_generated_once_and_not_trained() -> None:
    async with serving() as gateway, gateway.open() as session, client_of(session) as client:
        gateway.servers.gate.clear()
        asking = asyncio.create_task(client.chat.completions.create(model="any", messages=HELLO))
        await gateway.servers.begun.wait()
        asking.cancel()
        await asyncio.wait([asking])
        async with asyncio.timeout(ANSWER_SECONDS):
            [[call]] = session._calls._by_digest.values()
            while call.num_waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        gateway.servers.gate.set()
        answer = await client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Other"}])
        assert answer.choices[0].message.content
    check_record(session, gateway.servers)
    assert [node.is_trained for node in session.nodes() if node.is_sampled] == [False, True]


async def test_parallel_requests_of_one_session() -> None:
    async with serving() as gateway, gateway.open() as session, client_of(session) as client:
        asked = [HELLO, HELLO, *([{"role": "user", "content": str(number)}] for number in range(20))]
        answers = await asyncio.gather(*(client.chat.completions.create(model="any", messages=each) for each in asked))
        assert len({answer.choices[0].message.content for answer in answers}) == 22
        assert len({answer.id for answer in answers}) == 22
    check_record(session, gateway.servers)


async def test_an_edited_history_opens_a_branch() -> None:
    async with serving() as gateway, gateway.open() as session, client_of(session) as client:
        first = (await client.chat.completions.create(model="any", messages=HELLO)).choices[0].message
        edited: Any = [*HELLO, {"role": "assistant", "content": f"{first.content}, or so"}, *HELLO]
        await client.chat.completions.create(model="any", messages=edited)
    check_record(session, gateway.servers)
    assert session.counts().branches == {"edited": 1}


async def test_an_idempotency_key_gives_the_same_answer() -> None:
    async with serving() as gateway, gateway.open() as session, client_of(session) as client:
        named = {"Idempotency-Key": "k1"}
        answers = [
            await client.chat.completions.create(model="any", messages=HELLO, extra_headers=named) for _ in range(2)
        ]
        assert answers[0] == answers[1]
        with pytest.raises(openai.BadRequestError, match="Idempotency-Key"):
            await client.chat.completions.create(model="any", messages=[*HELLO, *HELLO], extra_headers=named)
    check_record(session, gateway.servers)


async def test_refusals_have_openais_form() -> None:
    async with serving(max_turns=1) as gateway, gateway.open() as session, client_of(session) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="any", messages=HELLO, n=2)
        assert (refused.value.param, refused.value.code) == ("n", "invalid_value")
        assert "send one request for each answer" in refused.value.message
        with pytest.raises(openai.BadRequestError, match=r"temperature is 0\.2; expected the run's 1"):
            await client.chat.completions.create(model="any", messages=HELLO, temperature=0.2)
        await client.chat.completions.create(model="any", messages=HELLO, temperature=1.0)
        with pytest.raises(openai.BadRequestError, match=r"agent\.max_turns") as cut:
            await client.chat.completions.create(model="any", messages=HELLO)
        assert cut.value.code == "episode_ended"
        with pytest.raises(openai.NotFoundError, match=r"responses is not served; expected POST /v1/chat/completions"):
            await client.responses.create(model="any", input="Hello")
    assert session.end == "max_turns"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "add"}]}]}, r"messages\[0\].tool_calls\[0\]"),
        ({"messages": HELLO, "tools": [{"type": "function", "function": {}}]}, r"tools\[0\]"),
        ({"messages": "Hello"}, r"Expected `array`, got `str` - at `\$\.messages`"),
    ],
)
async def test_what_is_not_of_openais_form_is_refused_by_its_place(body: Any, why: str) -> None:
    async with serving() as gateway, gateway.open() as session, client_of(session) as client:
        with pytest.raises(openai.BadRequestError, match=why):
            await client.post("/chat/completions", body=body, cast_to=object)
    assert not gateway.servers.calls


async def test_a_dead_key_is_refused_and_never_repeated() -> None:
    async with serving() as gateway:
        async with gateway.open() as session:
            pass
        for key, why, code in (
            (session.key, "the key of an episode that has ended", "episode_ended"),
            ("psk_" + 40 * "0", "no episode of this service has this key", "invalid_api_key"),
            ("sk-1", "a key of another form", "invalid_api_key"),
        ):
            async with client_of(session, api_key=key, max_retries=5) as client:
                with pytest.raises(openai.AuthenticationError, match=why) as refused:
                    await client.chat.completions.create(model="any", messages=HELLO)
                assert refused.value.code == code
        assert len(gateway.counts.refused) == 3
        assert not gateway.servers.calls


async def test_a_failed_call_is_repeated_by_the_client() -> None:
    async with serving() as gateway, gateway.open() as session, client_of(session, max_retries=2) as client:
        gateway.servers.failures = [ZeroDivisionError()]
        await client.chat.completions.create(model="any", messages=HELLO)
        assert gateway.counts.refused == ["internal_error"]
    assert len({call.seed for call in gateway.servers.calls}) == 1
    check_record(session, gateway.servers)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('{"reward": NaN}', "no JSON that can be used"),
        ('{"reward": "1.0"}', 'reward is "1.0"; expected a finite number'),
        ('{"reward": null}', "reward is null"),
        ("{}", "expected {"),
    ],
)
async def test_a_reward_that_is_no_number_is_refused(body: str, why: str) -> None:
    async with serving() as gateway, gateway.open() as session, httpx.AsyncClient() as client:
        json_type = {"Content-Type": "application/json"}
        refused = await client.put(f"{session.own_base_url}/reward", content=body, headers=json_type)
        assert refused.status_code == 400
        assert why in refused.json()["error"]["message"]
        assert session.reward is None


async def test_a_reward_is_given_at_both_addresses_and_with_the_episodes_key_alone() -> None:
    async with serving() as gateway, gateway.open() as session, httpx.AsyncClient() as client:
        runs_own = {"Authorization": f"Bearer {TOKEN.get_secret_value()}"}
        keyed = {"Authorization": f"Bearer {session.key}"}
        given = [
            await client.put(f"{session.own_base_url}/reward", json={"reward": 0.25}),
            await client.put(f"{session.base_url}/reward", json={"reward": 0.5}, headers=keyed),
            await client.put(f"{session.base_url}/reward", json={"reward": 1}, headers=runs_own),
        ]
    assert [answer.status_code for answer in given] == [200, 200, 401]
    assert session.reward == 0.5


async def test_a_body_that_is_too_long_is_refused_in_openais_form() -> None:
    async with serving() as gateway, gateway.open() as session, httpx.AsyncClient() as client:
        refused = await client.put(f"{session.own_base_url}/reward", content=b" " * 2**17)
        assert refused.status_code == 413
        assert "expected at most 65536" in refused.json()["error"]["message"]


async def test_keys_and_messages_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="penstock_agent")
    caplog.set_level("DEBUG", logger="uvicorn")
    async with serving() as gateway, gateway.open() as session:
        gateway.servers.failures = [ZeroDivisionError(), ZeroDivisionError()]
        for base_url in (session.base_url, session.own_base_url):
            async with client_of(session, base_url=base_url) as client:
                messages: Any = [{"role": "user", "content": "row-content"}]
                with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
                    await client.chat.completions.create(model="any", messages=messages)
    ours = "\n".join(
        record.getMessage() + (record.exc_text or "")
        for record in caplog.records
        if "penstock" in record.name or "uvicorn" in record.name
    )
    assert "failed by a defect" in ours
    assert session.key not in ours
    assert "row-content" not in ours

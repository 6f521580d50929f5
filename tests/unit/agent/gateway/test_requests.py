"""What a request may hold, and what is refused by name."""

import json
from typing import Any

import pytest

from penstock.contracts import Sampling
from penstock_agent.gateway.refusals import RequestRefusedError
from penstock_agent.gateway.requests import ChatRequest, Presentation, read_chat, read_reward

SAMPLING = Sampling(0.7, 64, (2, 5))
STOPS = frozenset({"</s>", "\n"})
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def read(body: dict[str, Any], **headers: str) -> tuple[ChatRequest, Presentation]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_chat(json.dumps({"messages": HELLO, **body}).encode(), named, SAMPLING, STOPS)


def refusal(body: dict[str, Any]) -> RequestRefusedError:
    with pytest.raises(RequestRefusedError) as caught:
        read(body)
    return caught.value


def test_a_plain_request() -> None:
    asked, shown = read({"model": "any"})
    assert asked == ChatRequest(HELLO, [])
    assert shown == Presentation()


def test_fields_with_a_meaning() -> None:
    asked, shown = read(
        {
            "tools": [TOOL],
            "tool_choice": "auto",
            "stop": ["\n"],
            "max_tokens": 9,
            "max_completion_tokens": 7,
            "temperature": 0.7,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 0,
        },
        x_penstock_auxiliary="1",
        idempotency_key="k",
        x_stainless_retry_count="2",
        x_session_id="main",
    )
    assert asked == ChatRequest(HELLO, [TOOL], 7, True, "k", True, "main")
    assert shown == Presentation(True, True, True)


@pytest.mark.parametrize(
    "harmless",
    [
        {"n": 1, "top_p": 1.0, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None},
        {"seed": 4, "user": "me", "metadata": {"a": "b"}, "parallel_tool_calls": False, "store": True},
        {"response_format": {"type": "text"}, "service_tier": "auto", "unknown_field": [1, 2]},
        {"stop": None, "tools": None, "tool_choice": None, "stream": None, "max_tokens": None, "stream_options": None},
    ],
)
def test_what_changes_nothing_is_accepted(harmless: dict[str, Any]) -> None:
    assert read(harmless)[0] == ChatRequest(HELLO, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("top_p", 0.9),
        ("temperature", 1.0),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("logit_bias", {"5": 1}),
        ("response_format", {"type": "json_object"}),
        ("top_logprobs", 5),
        ("top_k", 40),
        ("functions", [{"name": "add"}]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("stop", "Observation:"),
        ("max_tokens", 0),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "add"}}),
        ("tools", [{"type": "retrieval"}]),
        ("messages", [{"role": "function", "content": "4"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user"}]),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal({name: value})
    assert error.param == name
    assert name in str(error)
    assert "expected" in str(error)


def test_a_field_of_the_wrong_type_is_named() -> None:
    assert "$.max_tokens" in str(refusal({"max_tokens": "many"}))


@pytest.mark.parametrize("data", [b"", b"[]", b'{"messages": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(RequestRefusedError, match="no JSON that can be used"):
        read_chat(data, {}, SAMPLING, STOPS)


def test_parts_of_text_are_text_and_null_fields_are_left_out() -> None:
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]
    answer: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "audio": None}
    asked, _ = read({"messages": [{"role": "developer", "content": parts}, answer]})
    assert asked.messages == [{"role": "system", "content": "two parts"}, {"role": "assistant", "content": None}]


def test_tool_choice_none_offers_no_tool() -> None:
    assert read({"tools": [TOOL], "tool_choice": "none"})[0].tools == []


def test_equal_requests_have_equal_digests() -> None:
    one, same = ChatRequest([{"role": "user", "content": "a"}], []), ChatRequest([{"content": "a", "role": "user"}], [])
    assert one.digest == same.digest
    for other in (
        ChatRequest([{"role": "user", "content": "b"}], []),
        ChatRequest(one.messages, [TOOL]),
        ChatRequest(one.messages, [], max_new_tokens=3),
        ChatRequest(one.messages, [], auxiliary=True),
    ):
        assert other.digest != one.digest


def test_a_reward_is_a_finite_number() -> None:
    assert read_reward(b'{"reward": 1}') == 1.0
    assert read_reward(b'{"reward": -0.5, "why": "late"}') == -0.5


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b'{"reward": NaN}', "no JSON"),
        (b'{"reward": Infinity}', "no JSON"),
        (b'{"reward": 1e999}', ""),
        (b'{"reward": 1' + 400 * b"0" + b"}", "reward is 1000"),
        (b'{"reward": "1.0"}', 'reward is "1.0"'),
        (b'{"reward": null}', "reward is null"),
        (b'{"reward": true}', "reward is true"),
        (b'{"reward": [1]}', "reward is [1]"),
        (b'{"score": 1}', "score"),
        (b"1.0", "no JSON"),
    ],
)
def test_any_other_reward_is_refused_by_name(data: bytes, seen: str) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        read_reward(data)
    assert seen in str(caught.value)
    assert "expected" in str(caught.value)

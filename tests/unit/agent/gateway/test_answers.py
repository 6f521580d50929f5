"""Answers in OpenAI's shape."""

import json
from typing import Any

from penstock.contracts import pack_float32, pack_int32
from penstock_agent.gateway import answers
from penstock_agent.gateway.answers import ChatAnswer
from penstock_agent.gateway.requests import Presentation

CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
ANSWER = ChatAnswer(
    id="chatcmpl-1",
    created=5,
    message={"role": "assistant", "content": "I add.", "reasoning_content": "Hm.", "tool_calls": [CALL, CALL]},
    finish_reason="tool_calls",
    token_ids=pack_int32([104, 233]),
    logprobs=pack_float32([-0.5, -0.25]),
    num_prompt_tokens=10,
    num_cached_tokens=8,
)


def events(shown: Presentation) -> list[dict[str, Any]]:
    sent = b"".join(answers.events(ANSWER, "m", shown, chr)).decode()
    lines = sent.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_body_has_message_usage_and_reason() -> None:
    body = json.loads(answers.body(ANSWER, "m", Presentation(), chr))
    assert (body["id"], body["object"], body["model"]) == ("chatcmpl-1", "chat.completion", "m")
    choice = body["choices"][0]
    assert choice["message"] == {**ANSWER.message, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("tool_calls", None)
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 8},
    }


def test_logprobs_are_of_each_sampled_token() -> None:
    body = json.loads(answers.body(ANSWER, "m", Presentation(logprobs=True), chr))
    assert body["choices"][0]["logprobs"]["content"] == [
        {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": []},
        {"token": "\u00e9", "logprob": -0.25, "bytes": [195, 169], "top_logprobs": []},
    ]


def test_a_stream_holds_what_the_body_holds() -> None:
    sent = events(Presentation(stream=True, include_usage=True, logprobs=True))
    deltas = [each["choices"][0]["delta"] for each in sent if each["choices"]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm."},
        {"content": "I add."},
        {"tool_calls": [{"index": 0, **CALL}]},
        {"tool_calls": [{"index": 1, **CALL}]},
        {},
    ]
    body = json.loads(answers.body(ANSWER, "m", Presentation(logprobs=True), chr))
    assert sent[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert sent[-2]["choices"][0]["logprobs"] == body["choices"][0]["logprobs"]
    assert (sent[-1]["choices"], sent[-1]["usage"]) == ([], body["usage"])


def test_usage_is_streamed_only_if_asked_for() -> None:
    assert all("usage" not in each for each in events(Presentation(stream=True)))

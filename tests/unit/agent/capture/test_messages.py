"""When two messages are the same, and which are none."""

from typing import Any

import pytest

from penstock_agent.capture.messages import forms, text_of, without_reasoning

CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": [2]}'}}


def _with(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [CALL], **changes}


@pytest.mark.parametrize(
    "other",
    [
        _with(content=""),
        _with(refusal=None, audio=None, annotations=[]),
        _with(tool_calls=[{**CALL, "id": "other"}]),
        _with(tool_calls=[{**CALL, "function": {"name": "add", "arguments": '{"y":[2],"x":1}'}}]),
        _with(tool_calls=[{**CALL, "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}]),
    ],
)
def test_what_clients_change_on_the_way_is_no_edit(other: dict[str, Any]) -> None:
    assert forms([other]) == forms([_with()])


@pytest.mark.parametrize(
    "other",
    [
        _with(content="x"),
        _with(role="user"),
        _with(tool_calls=[CALL, CALL]),
        _with(tool_calls=[{**CALL, "function": {"name": "sub", "arguments": CALL["function"]["arguments"]}}]),  # type: ignore[index]
        _with(tool_calls=[{**CALL, "function": {"name": "add", "arguments": '{"x": 2, "y": [2]}'}}]),
        _with(reasoning_content="so"),
    ],
)
def test_what_the_model_would_read_differently_is_an_edit(other: dict[str, Any]) -> None:
    assert forms([other]) != forms([_with()])


def test_parts_of_text_are_the_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert forms([{"role": "user", "content": parts}]) == forms([{"role": "user", "content": "ab"}])
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    assert forms([{"role": "user", "content": image}]) != forms([{"role": "user", "content": "ab"}])
    assert text_of(image) == ""


def test_results_are_matched_to_calls_by_position() -> None:
    def results(first: str, second: str, answers: tuple[str, str]) -> list[bytes]:
        calls = [{**CALL, "id": first}, {**CALL, "id": second}]
        return forms(
            [_with(tool_calls=calls)] + [{"role": "tool", "tool_call_id": each, "content": "3"} for each in answers]
        )

    assert results("a", "b", ("a", "b")) == results("c", "d", ("c", "d"))
    assert results("a", "b", ("a", "b")) != results("c", "d", ("d", "c"))


def test_two_names_of_reasoning_are_one() -> None:
    one, other = _with(reasoning_content="so"), _with(reasoning="so")
    assert forms([one]) == forms([other])
    assert forms([without_reasoning(one)]) == forms([_with()])

"""Calls of tools as text: what is read, what is written, and what stays text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock_agent.capture.messages import Message, Tool
from penstock_agent.capture.tool_calls import FORMATS, ToolCall

TOOL: Tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
NAMES = st.text("abc_", min_size=1)
ARGUMENTS = st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.none()), max_size=3)


@pytest.mark.parametrize("name", FORMATS)
@given(called=NAMES, arguments=ARGUMENTS)
def test_what_a_format_writes_it_reads(name: str, called: str, arguments: dict[str, object]) -> None:
    read = FORMATS[name].read(FORMATS[name].write(called, arguments))
    if "</tool_call>" not in json.dumps(arguments, ensure_ascii=False):
        assert (read.content, read.calls, read.num_failed) == ("", (ToolCall(called, arguments),), 0)


def test_parallel_calls_and_the_text_around_them() -> None:
    read = FORMATS["hermes"].read(
        'First.\n<tool_call>{"name": "a"}</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": "{\\"x\\": 1}"}\n</tool_call>'
    )
    assert (read.content, read.calls) == ("First.", (ToolCall("a", {}), ToolCall("b", {"x": 1})))


@pytest.mark.parametrize(
    "inside",
    [
        "",
        "{",
        "3",
        "[]",
        '{"name": 3}',
        '{"name": ""}',
        '{"name": "a", "arguments": 3}',
        "[" * 100_000,
        '{"name": "a", "arguments": {"x": NaN}}',
        '{"name": "a", "arguments": {"x": "\\ud800"}}',
    ],
)
def test_a_call_that_cannot_be_read_stays_text(inside: str) -> None:
    text = f'x<tool_call>{inside}</tool_call><tool_call>{{"name": "a"}}</tool_call>'
    read = FORMATS["hermes"].read(text)
    assert (read.content, read.calls, read.num_failed) == (
        f"x<tool_call>{inside}</tool_call>",
        (ToolCall("a", {}),),
        1,
    )


def test_a_call_that_was_cut_is_no_call() -> None:
    text = 'x<tool_call>{"name": "a", "arguments": {}}'
    assert FORMATS["hermes"].read(text).num_failed == 1
    assert FORMATS["hermes"].read(text).content == text
    assert FORMATS["llama3"].read('{"name": "a", "parameters": {"x"').num_failed == 1


@pytest.mark.parametrize("text", ['{"answer": 3}', "It is {3}.", "{x}", '["name"]', "", "{"])
def test_other_json_is_no_call(text: str) -> None:
    for tool_format in FORMATS.values():
        read = tool_format.read(text)
        assert (read.content, read.calls, read.num_failed) == (text, (), 0)


@given(st.text())
def test_reading_never_fails(text: str) -> None:
    for tool_format in FORMATS.values():
        for each in (text, f"<tool_call>{text}", f'{{"name": {text}'):
            assert tool_format.read(each).num_failed in (0, 1)


def test_tools_as_messages_for_a_template_without_them() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    messages: list[Message] = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "so", "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "a", "content": "2"},
    ]
    dressed = FORMATS["hermes"].dress(messages, [TOOL])
    assert [message["role"] for message in dressed] == ["system", "user", "assistant", "user"]
    assert dressed[0]["content"].startswith("S\n\n")
    assert '"name": "add"' in dressed[0]["content"]
    assert FORMATS["hermes"].read(dressed[2]["content"]).calls == (ToolCall("add", {"x": 1}),) * 2
    assert dressed[3]["content"].count("<tool_response>") == 2
    assert messages[2]["content"] == "so"
    assert FORMATS["hermes"].dress(messages[1:2], [TOOL])[0]["role"] == "system"
    assert FORMATS["hermes"].dress(messages[:2], []) == messages[:2]

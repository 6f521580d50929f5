"""Chat messages in OpenAI's form, and when two of them are the same.

Owns the canonical form. Clients send each message again with every call, and on the way they drop keys that are null,
write the arguments of a tool call with other white space, or turn a text into a list of parts. None of that is an edit.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from penstock.errors import CallRefusedError

Message = dict[str, Any]
"""role, content, and tool_calls, tool_call_id, name or reasoning_content where they apply."""
Tool = dict[str, Any]
"""{"type": "function", "function": {"name", "description", "parameters"}}"""
Form = bytes
"""Digest of a message's canonical form: equal for messages that are the same."""

REASONING = ("reasoning_content", "reasoning")  # two names of one field: servers differ


def text_of(content: object) -> str:
    """The text of a message's content: a string, parts of text one after the other, or nothing.

    >>> text_of([{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}])
    'two parts'
    """
    joined = _joined(content)
    return joined if isinstance(joined, str) else ""


def required_text(number: int, message: Mapping[str, Any]) -> str:
    """The text of a call's message; CallRefusedError if its content has another part."""
    content = message.get("content")
    if not (content is None or isinstance(_joined(content), str)):
        raise CallRefusedError(f"message {number} has content that is not text: expected text")
    return text_of(content)


def reasoning_of(message: Mapping[str, Any]) -> str:
    """What the model thought before an answer; empty if the message has none."""
    return next((message[key] for key in REASONING if message.get(key)), "")


def arguments_of(call: Mapping[str, Any]) -> Any:
    """The arguments of a tool call as an object; the text itself if it is not JSON."""
    arguments = call["function"].get("arguments")
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def check_messages(messages: Sequence[Message], tools: Sequence[Tool]) -> None:
    """CallRefusedError, with the place, for what is not of OpenAI's form."""
    if not messages:
        raise CallRefusedError("the call has no messages: expected at least one")
    for number, message in enumerate(messages):
        _check_message(f"messages[{number}]", message)
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise CallRefusedError(
                f'tools[{number}] is no tool: expected {{"type": "function", "function": {{"name": ...}}}}'
            )
    try:
        json.dumps([list(messages), list(tools)], ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CallRefusedError(
            f"the messages or tools are no JSON in UTF-8 ({error}): expected what can be sent"
        ) from error


def _check_message(place: str, message: object) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise CallRefusedError(f"{place} is no message: expected an object with a role")
    content, calls = message.get("content"), message.get("tool_calls")
    if not (content is None or isinstance(content, str | list)):
        raise CallRefusedError(f"{place}.content is {type(content).__name__}: expected text or a list of parts")
    if not isinstance(message.get("tool_call_id") or "", str):
        raise CallRefusedError(f"{place}.tool_call_id is no text: expected the id of a call")
    if not isinstance(calls or [], list):
        raise CallRefusedError(f"{place}.tool_calls is {type(calls).__name__}: expected a list")
    for position, call in enumerate(calls or []):
        function = call.get("function") if isinstance(call, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(call.get("id") or "", str)
        ):
            raise CallRefusedError(
                f'{place}.tool_calls[{position}] is no call: expected {{"id", "type": "function", "function": '
                '{"name", "arguments"}}'
            )


def forms(messages: Sequence[Message]) -> list[Form]:
    """The form of each message of a conversation.

    The ids of tool calls are made up by servers and clients, so calls and their results are matched by position.

    >>> call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x":1}'}}
    >>> same = {"id": "b", "type": "function", "function": {"name": "add", "arguments": '{ "x": 1 }'}}
    >>> forms([{"role": "assistant", "content": "", "tool_calls": [call]}]) == forms(
    ...     [{"role": "assistant", "content": None, "tool_calls": [same], "refusal": None}])
    True
    """
    calls: dict[str, str] = {}
    found = []
    for number, message in enumerate(messages):
        for position, call in enumerate(message.get("tool_calls") or ()):
            if call.get("id"):
                calls[call["id"]] = f"{number}.{position}"
        found.append(_form(message, calls))
    return found


def form_of_tools(tools: Sequence[Tool]) -> Form:
    """The form of a list of tools."""
    return _digest(list(tools))


def form_of_tokens(token_ids: Sequence[int]) -> Form:
    """The form of a prompt."""
    return _digest(list(token_ids))


def written(message: Message) -> str:
    """A message as text for people: what it says, and the tools that it calls."""
    calls = [(call["function"]["name"], arguments_of(call)) for call in message.get("tool_calls") or ()]
    lines = [reasoning_of(message), text_of(message.get("content"))]
    lines += [f"{name}({json.dumps(arguments, ensure_ascii=False)})" for name, arguments in calls]
    return "\n".join(line for line in lines if line)


def without_reasoning(message: Message) -> Message:
    """The message as clients send it back that drop what they do not know."""
    return {key: value for key, value in message.items() if key not in REASONING}


def _form(message: Message, calls: Mapping[str, str]) -> Form:
    plain = {key: value for key, value in without_reasoning(message).items() if value not in (None, "", [], {})}
    if "content" in plain and (content := _joined(plain.pop("content"))):
        plain["content"] = content
    if reasoning := reasoning_of(message):
        plain["reasoning_content"] = reasoning
    if "tool_calls" in plain:
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    if "tool_call_id" in plain:
        plain["tool_call_id"] = calls.get(plain["tool_call_id"], plain["tool_call_id"])
    return _digest(plain)


def _plain_call(call: Mapping[str, Any]) -> Any:
    return [call["function"]["name"], arguments_of(call)]


def _joined(content: object) -> object:
    """A list of parts that are all text as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = [part if isinstance(part, str) else _text_of_part(part) for part in content]
    return content if None in texts else "".join(text for text in texts if text is not None)


def _text_of_part(part: object) -> str | None:
    if not isinstance(part, dict) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        return None
    return str(part["text"])


def _digest(value: object) -> Form:
    return xxhash.xxh3_128_digest(json.dumps(value, sort_keys=True).encode())

"""The forms in which a model writes calls of tools as text.

Owns reading and writing them. Invariant: reading never fails. A call that cannot be read stays text, and is counted.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock_agent.capture.messages import Message, Tool, arguments_of, text_of

HERMES = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
PYTHON_TAG = "<|python_tag|>"  # some models of the Llama 3 family begin a call with it


@dataclass(frozen=True)
class ToolCall:
    """A call that could be read. id: its own, if the model writes one."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True)
class Read:
    """What a turn holds: content, with the calls that could not be read in it, and the calls."""

    content: str
    calls: tuple[ToolCall, ...] = ()
    num_failed: int = 0


@dataclass(frozen=True)
class ToolFormat:
    """One form. The last three are for templates that show no tools: then the messages themselves show them."""

    read: Callable[[str], Read]
    write: Callable[[str, Any], str]
    example: str
    result: Callable[[str], str]

    def instructions(self, tools: Sequence[Tool]) -> str:
        """What a system message tells about tools."""
        functions = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
        return (
            f"You can call these functions:\n{functions}\nTo call one, write its name and arguments as\n{self.example}"
        )

    def dress(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
        """Messages that show tools, calls and results as text."""
        dressed: list[Message] = []
        for number, message in enumerate(messages):
            if message.get("role") == "tool":
                content = self.result(text_of(message.get("content")))
                if number and messages[number - 1].get("role") == "tool":
                    dressed[-1] = {"role": "user", "content": f"{dressed[-1]['content']}\n{content}"}
                else:
                    dressed.append({"role": "user", "content": content})
            elif message.get("tool_calls"):
                calls = [self.write(call["function"]["name"], arguments_of(call)) for call in message["tool_calls"]]
                kept = {key: value for key, value in message.items() if key != "tool_calls"}
                content = "\n".join(part for part in (text_of(message.get("content")), *calls) if part)
                dressed.append({**kept, "content": content})
            else:
                dressed.append(message)
        if not tools:
            return dressed
        if dressed and dressed[0].get("role") == "system":
            first = text_of(dressed[0].get("content"))
            return [{**dressed[0], "content": f"{first}\n\n{self.instructions(tools)}"}, *dressed[1:]]
        return [{"role": "system", "content": self.instructions(tools)}, *dressed]


def to_call(name: object, arguments: object, id: str = "") -> ToolCall | None:
    """A call if name and arguments can be one's."""
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        json.dumps([name, arguments], allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # half a character, or a number that JSON does not have
        return None
    return ToolCall(name, arguments, id)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_hermes(text: str) -> Read:
    calls: list[ToolCall] = []
    failed = 0

    def take(match: re.Match[str]) -> str:
        nonlocal failed
        written = _json(match[1])
        call = to_call(written.get("name"), written.get("arguments", {})) if isinstance(written, dict) else None
        if call is None or not match[2]:
            failed += 1
            return match[0]
        calls.append(call)
        return ""

    rest = HERMES.sub(take, text)
    return Read(rest.strip() if calls else rest, tuple(calls), failed)


def _read_llama3(text: str) -> Read:
    body = text.strip().removeprefix(PYTHON_TAG).strip()
    if not body.startswith("{"):
        return Read(text)
    written = _json(body)
    if not isinstance(written, dict):
        looks_like_a_call = re.match(r'\{\s*"(name|type)"', body) is not None
        return Read(text, (), int(looks_like_a_call))
    if "name" not in written:
        return Read(text)
    call = to_call(written["name"], written.get("parameters", written.get("arguments", {})))
    return Read("", (call,)) if call else Read(text, (), 1)


def _writes(key: str) -> Callable[[str, Any], str]:
    return lambda name, arguments: json.dumps({"name": name, key: arguments}, ensure_ascii=False)


FORMATS = {
    "hermes": ToolFormat(
        _read_hermes,
        lambda name, arguments: f"<tool_call>\n{_writes('arguments')(name, arguments)}\n</tool_call>",
        '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>',
        lambda content: f"<tool_response>\n{content}\n</tool_response>",
    ),
    "llama3": ToolFormat(
        _read_llama3, _writes("parameters"), '{"name": ..., "parameters": {...}}', lambda content: content
    ),
}
"""By the name that `agent.tool_format` has for it."""

"""Families of models whose templates the library `renderers` knows by heart.

Owns the choice of a family, and the use of that library. Invariant: a family is chosen by itself only if it gives the
tokens of the model's own template for every probe, so that a changed template is never taken for the known one.
"""

import time
from collections.abc import Sequence
from typing import Any

from renderers import base
from renderers.configs import config_from_name

from penstock.errors import CallRefusedError
from penstock_agent.capture.chat_template import ChatTemplate, Tokenizer, plain_message
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.capture.tool_calls import Read, ToolCall, to_call

READABLE = ("ok", "unknown_tool", "invalid_json")  # the last: an argument that is no JSON is text; a call all the same

LOADS = {"gpt-oss": "<|channel|>"}
"""Families that load files of their own when they are made, and a token without which there is no need to."""

_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look at it.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]},
    },
}
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_USER: Message = {"role": "user", "content": "Well?"}
_ANSWER: Message = {"role": "assistant", "content": "Yes."}
_THOUGHT: Message = {"role": "assistant", "content": "Yes.", "reasoning_content": "Is it so?"}


def _calls(count: int) -> list[Message]:
    calls = [
        {"id": f"call_{each}", "type": "function", "function": {"name": "look", "arguments": {"at": str(each)}}}
        for each in range(count)
    ]
    results = [
        {"role": "tool", "tool_call_id": f"call_{each}", "name": "look", "content": f"seen {each}"}
        for each in range(count)
    ]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]


_ONE_CALL: tuple[Message, list[Message], tuple[Tool, ...]] = (_calls(1)[0], _calls(1)[1:], (_TOOL,))
PROBES: tuple[tuple[list[Message], tuple[Tool, ...]], ...] = (
    ([_USER], ()),
    ([_SYSTEM, _USER], ()),
    ([_SYSTEM, _USER, _ANSWER, _USER], ()),
    ([_USER, _THOUGHT, _USER], ()),
    ([_SYSTEM, _USER], (_TOOL,)),
    ([_SYSTEM, _USER, *_calls(1)], (_TOOL,)),
    ([_USER, *_calls(2), _THOUGHT, _USER], (_TOOL,)),
)
"""Conversations and their tools. Both sides may refuse one."""


class Family:
    """A family, for one tokenizer.

    stop_token_ids: what ends a turn. continues: whether it is known how: the probes show that what is appended is what
    a whole prompt has behind the turn's end.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, *, keeps_thinking: bool) -> None:
        """keeps_thinking: earlier turns keep their thinking even if the template would drop it."""
        self.name = name
        self._tokenizer = tokenizer
        self._renderer = _renderer(name, tokenizer, "all" if keeps_thinking else None)
        self.stop_token_ids: tuple[int, ...] = tuple(self._renderer.get_stop_token_ids())
        self.continues = all(
            self._is_continued(turn, new, tools) for turn, new, tools in ((_ANSWER, [_USER], ()), _ONE_CALL)
        )

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """As a chat template would; CallRefusedError if the family has no form for the messages."""
        given = [plain_message(number, message) for number, message in enumerate(messages)]
        try:
            token_ids: list[int] = self._renderer.render_ids(
                given, tools=list(tools) or None, add_generation_prompt=True
            )
        except Exception as error:  # of a library, which has no one error for this
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise CallRefusedError(
                f"the form of {self.name} refuses messages with roles {roles} ({error}): expected messages that it "
                "accepts"
            ) from error
        return token_ids

    def after(
        self, path_ids: Sequence[int], turn_start: int, new: Sequence[Message], tools: Sequence[Tool]
    ) -> list[int] | None:
        """The tokens that follow a path whose last turn was sampled from `turn_start` on; None if they are unknown."""
        return self._bridged(path_ids, turn_start, new, tools) if self.continues else None

    def read(self, prompt_ids: Sequence[int], token_ids: Sequence[int], tools: Sequence[Tool]) -> tuple[Read, str]:
        """A sampled turn, and what was thought before it. Without tools, calls are text."""
        parsed = self._renderer.parse_response(list(token_ids), tools=list(tools) or None, prompt_ids=list(prompt_ids))
        calls: list[ToolCall] = []
        unread: list[str] = []
        for attempt in parsed.tool_calls:
            readable = tools and attempt.status in READABLE
            if readable and (call := to_call(attempt.name, attempt.arguments, attempt.id or "")):
                calls.append(call)
            elif attempt.token_span:
                start, end = attempt.token_span
                unread.append(self._tokenizer.decode(list(token_ids[start:end]), skip_special_tokens=False))
            else:
                unread.append(attempt.raw)
        content = "\n".join(part for part in (parsed.content, *unread) if part)
        return Read(content, tuple(calls), len(unread) if tools else 0), parsed.reasoning_content or ""

    def _bridged(
        self, path_ids: Sequence[int], turn_start: int, new: Sequence[Message], tools: Sequence[Tool]
    ) -> list[int] | None:
        given = [plain_message(number, message) for number, message in enumerate(new)]
        path = list(path_ids)
        try:
            bridged = self._renderer.bridge_to_next_turn(
                path[:turn_start], path[turn_start:], given, tools=list(tools) or None
            )
        except Exception:  # of a library, about messages that it does not know
            return None
        if bridged is None or bridged.token_ids[: len(path)] != path:
            return None
        added: list[int] = bridged.token_ids[len(path) :]
        return added

    def _is_continued(self, turn: Message, new: Sequence[Message], tools: Sequence[Tool]) -> bool:
        try:
            prompt, whole = self.render([_USER], tools), self.render([_USER, turn, *new], tools)
        except CallRefusedError:
            return False
        said = [*prompt, *self._tokenizer.encode("</think>Yes.", add_special_tokens=False)]  # the prompt may open it
        for end in self.stop_token_ids:
            added = self._bridged([*said, end], len(prompt), new, tools)
            if added and whole[-len(added) - 1 :] == [end, *added]:
                return True
        return False


def family_names() -> list[str]:
    """Those that `agent.tool_format` may name."""
    base._populate_registry()
    return sorted(set(base.RENDERER_REGISTRY) - {"default"})


def detect(tokenizer: Tokenizer, template: ChatTemplate) -> str | None:
    """The family that writes every probe as the template does."""
    expected = [_outcome(template, messages, tools) for messages, tools in PROBES]
    for name in family_names():
        if name in LOADS and LOADS[name] not in tokenizer.get_added_vocab():
            continue
        try:
            family = Family(name, tokenizer, keeps_thinking=False)
        except Exception:  # most often, the tokenizer lacks a token of the family
            continue
        if all(
            _rendered(family, messages, tools) == tokens
            for (messages, tools), tokens in zip(PROBES, expected, strict=True)
        ):
            return name
    return None


def _outcome(template: ChatTemplate, messages: list[Message], tools: tuple[Tool, ...]) -> list[int] | None:
    try:
        return template.encode(template.text(messages, tools))
    except CallRefusedError:
        return None


def _rendered(family: Family, messages: list[Message], tools: tuple[Tool, ...]) -> list[int] | None:
    try:
        return family.render(messages, tools)
    except CallRefusedError:
        return None


def _renderer(name: str, tokenizer: Tokenizer, retention: str | None) -> Any:
    config = config_from_name(name)
    changes: dict[str, Any] = {"thinking_retention": retention}
    if "date_string" in type(config).model_fields:
        changes["date_string"] = time.strftime("%d %b %Y")  # as the template writes it
    return base.create_renderer(tokenizer, type(config)(**changes))

"""Messages by the chat template of the model, and its turns as messages.

Invariant: prompts are rendered by the model's own template. What a template does not say is how a turn is continued and
how one is read: that is known of a family, or shown by probes, or unknown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from penstock.contracts.vocabulary import FinishReason
from penstock.contracts.wire import pack_int32
from penstock.errors import CallRefusedError
from penstock_agent.capture.chat_template import ChatTemplate, Tokenizer
from penstock_agent.capture.families import Family
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.capture.rendering import Parsed
from penstock_agent.capture.suffix import Suffixes
from penstock_agent.capture.tool_calls import Read, ToolFormat

THINK, THOUGHT = "<think>", "</think>"
OPENING_TOKENS = 16
"""More than a prompt that opens the thinking has behind the header of the turn."""


@dataclass(frozen=True)
class Parts:
    """What is known of a model.

    writer: renders prompts. family: continues turns; else suffixes do. reader: reads calls of tools; None: unknown.
    shows_tools: whether prompts show tools and calls; else `reader` writes them into messages, if it is a format.
    stop_token_ids: of the model's configuration.
    """

    tokenizer: Tokenizer
    writer: "ChatTemplate | Family"
    family: Family | None
    suffixes: Suffixes | None
    reader: "Family | ToolFormat | None"
    shows_tools: bool
    stop_token_ids: tuple[int, ...]


class ModelRendering:
    """`agent.template` model."""

    separator = "\n"

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        ends = list(parts.stop_token_ids)
        if parts.family:
            ends += parts.family.stop_token_ids
        if parts.suffixes and parts.suffixes.end_token_id is not None:
            ends.append(parts.suffixes.end_token_id)
        self.stop_token_ids: tuple[int, ...] = tuple(sorted(set(ends)))

    def count(self, text: str) -> int:
        """Tokens of a text within a message."""
        return len(self._parts.tokenizer.encode(text, add_special_tokens=False))

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """The tokens of the template's text; CallRefusedError for messages or tools that it has no form for."""
        messages, tools = self._dressed(messages, tools)
        writer = self._parts.writer
        if isinstance(writer, Family):
            return writer.render(messages, tools)
        return writer.encode(writer.text(messages, tools))

    def continuation(
        self,
        path_ids: Sequence[int],
        turn_start: int,
        before: Sequence[Message],
        new: Sequence[Message],
        tools: Sequence[Tool],
    ) -> list[int] | None:
        """By the model's family if it has a known one, else by what the template writes behind any turn."""
        if self._parts.family and self._parts.family.continues:
            return self._parts.family.after(path_ids, turn_start, new, tools)
        if self._parts.suffixes:
            tools = tools if self._parts.shows_tools else ()  # the first message shows them then
            (turn, *after), shown = self._dressed([before[-1], *new], tools)
            return self._parts.suffixes.after(path_ids, turn, after, shown)
        return None

    def parse(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], finish_reason: FinishReason, tools: Sequence[Tool]
    ) -> Parsed:
        """Thinking, content and calls. Calls are read only if the call offers tools."""
        ended = finish_reason == "stop" or token_ids[-1] in self.stop_token_ids
        text = self._parts.tokenizer.decode(list(token_ids[:-1] if ended else token_ids), skip_special_tokens=False)
        read, thinking = self._read(prompt_ids, token_ids, text, tools)
        message: Message = {"role": "assistant", "content": read.content or (None if read.calls else "")}
        if thinking:
            message["reasoning_content"] = thinking
        if read.calls:
            origin = xxhash.xxh3_64_hexdigest(pack_int32(prompt_ids) + pack_int32(token_ids))
            message["tool_calls"] = [
                {
                    "id": call.id or f"call_{origin}{number}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for number, call in enumerate(read.calls)
            ]
        return Parsed(message, text, read.num_failed)

    def token_text(self, token_id: int) -> str:
        return self._parts.tokenizer.decode([token_id], skip_special_tokens=False)

    def _read(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], text: str, tools: Sequence[Tool]
    ) -> tuple[Read, str]:
        reader = self._parts.reader
        if isinstance(reader, Family):
            try:
                return reader.read(prompt_ids, token_ids, tools)
            except Exception:  # of a library, about what the model wrote: it stays text
                return Read(text, (), int(bool(tools))), ""
        opening = self._parts.tokenizer.decode(list(prompt_ids[-OPENING_TOKENS:]), skip_special_tokens=False)
        thinking, content = split_thinking(text, opened=opening.rstrip().endswith(THINK))
        return (reader.read(content) if tools and isinstance(reader, ToolFormat) else Read(content)), thinking

    def _dressed(self, messages: Sequence[Message], tools: Sequence[Tool]) -> tuple[Sequence[Message], Sequence[Tool]]:
        """Messages and tools as the template is to get them; CallRefusedError if it cannot show them."""
        if not tools and not any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
            return messages, ()
        if self._parts.shows_tools and self._parts.reader:
            return messages, tools
        if isinstance(self._parts.reader, ToolFormat):
            return self._parts.reader.dress(messages, tools), ()
        raise CallRefusedError(
            "the call has tools, and "
            + (
                "the form in which the model in actor.path writes calls is not known"
                if self._parts.shows_tools
                else "the chat template in actor.path is a template without tools"
            )
            + ": expected no tools, or agent.tool_format hermes or llama3"
        )


def split_thinking(text: str, *, opened: bool) -> tuple[str, str]:
    """What a turn thinks and what it says. opened: the prompt has begun the thinking.

    >>> split_thinking("<think>\\nIs it so?\\n</think>\\n\\nYes.", opened=False)
    ('Is it so?', 'Yes.')
    """
    body = text.lstrip()
    if not opened and not body.startswith(THINK):
        return "", text
    thinking, _, said = body.removeprefix(THINK).partition(THOUGHT)
    return thinking.strip(), said.lstrip("\n")

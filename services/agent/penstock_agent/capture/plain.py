"""Messages without a chat template: one text after the other.

Invariant: a path of tokens is only ever appended to. A prompt has the tokens that the trainer gives the same text.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from penstock.contracts.vocabulary import FinishReason
from penstock.errors import CallRefusedError
from penstock.plain_tokens import plain_token_ids
from penstock_agent.capture.messages import Message, Tool, required_text
from penstock_agent.capture.rendering import Parsed


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that are used."""

    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class PlainRendering:
    """`agent.template` plain: for models that continue a text."""

    separator = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        end = tokenizer.eos_token_id
        self.stop_token_ids: tuple[int, ...] = (end,) if isinstance(end, int) else ()

    def count(self, text: str) -> int:
        """Tokens of a text within a message."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """The tokens of all contents as one text."""
        token_ids = plain_token_ids(_joined(messages, tools), self._tokenizer)
        if not token_ids:
            raise CallRefusedError("the messages have no text: expected a prompt of at least one token")
        return token_ids

    def continuation(
        self,
        path_ids: Sequence[int],
        turn_start: int,
        before: Sequence[Message],
        new: Sequence[Message],
        tools: Sequence[Tool],
    ) -> list[int]:
        """The tokens of the new contents. A turn that was cut needs no end, because nothing marks one."""
        return self._tokenizer.encode(_joined(new, tools), add_special_tokens=False)

    def parse(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], finish_reason: FinishReason, tools: Sequence[Tool]
    ) -> Parsed:
        """The text without the token that stopped it, as for a completion of one turn."""
        written = token_ids[:-1] if finish_reason == "stop" else token_ids
        text = self._tokenizer.decode(list(written), skip_special_tokens=True)
        end = self._tokenizer.decode(list(token_ids[len(written) :]), skip_special_tokens=True)
        return Parsed({"role": "assistant", "content": text}, text, end=end)

    def token_text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def _joined(messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    if tools or any(message.get("tool_calls") for message in messages):
        raise CallRefusedError(
            "the call has tools, and agent.template is plain, which has no form for them: expected no tools, or "
            "agent.template model"
        )
    return "".join(required_text(number, message) for number, message in enumerate(messages))

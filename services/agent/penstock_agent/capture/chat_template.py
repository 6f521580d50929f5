"""Messages as the text of a model's own chat template.

Owns calling the template, and the form in which it gets messages. Invariant: a message that it gets has text as its
content, and arguments of calls as objects; a template that refuses is a fault of the call.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from penstock.errors import CallRefusedError
from penstock_agent.capture.messages import Message, Tool, arguments_of, required_text


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that are used."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def convert_tokens_to_ids(self, tokens: str) -> Any: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(self, conversation: list[Message], *, tokenize: bool, **kwargs: Any) -> str: ...


class ChatTemplate:
    """The template of a tokenizer that has one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def text(self, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
        """All messages, up to where the assistant's turn begins; CallRefusedError if the template refuses them."""
        given = [plain_message(number, message) for number, message in enumerate(messages)]
        try:
            return self._tokenizer.apply_chat_template(
                given, tools=list(tools) or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of its own, which may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise CallRefusedError(
                f"the chat template in actor.path refuses messages with roles {roles} ({reason}): expected messages "
                "that it accepts"
            ) from error

    def encode(self, text: str) -> list[int]:
        """The tokens of a text of the template, which writes its special tokens itself."""
        return self._tokenizer.encode(text, add_special_tokens=False)


def plain_message(number: int, message: Message) -> Message:
    """A message as templates take it; CallRefusedError for content that is not text."""
    text = required_text(number, message)
    kept = {key: value for key, value in message.items() if value is not None}
    if calls := message.get("tool_calls"):
        kept["tool_calls"] = [
            {**call, "type": "function", "function": {**call["function"], "arguments": arguments_of(call)}}
            for call in calls
        ]
    else:
        kept.pop("tool_calls", None)
    return {**kept, "content": text}

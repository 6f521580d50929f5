"""What turns messages into tokens, and sampled tokens into a message.

Owns the protocol; there is one rendering per service. Invariant: a continuation holds no token of a turn that was
sampled, and is None if the rendering cannot know it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.contracts.vocabulary import FinishReason
from penstock_agent.capture.messages import Message, Tool


@dataclass(frozen=True)
class Parsed:
    """A sampled turn as a message.

    message: role, content, and tool_calls or reasoning_content if the model wrote any. text: all that it wrote, without
    the token that ended the turn. num_failed_tool_calls: calls that could not be parsed; they stay in the content. end:
    the text of that token, if a transcript shows it before what follows.
    """

    message: Message
    text: str
    num_failed_tool_calls: int = 0
    end: str = ""

    @property
    def num_tool_calls(self) -> int:
        """Calls that the model asked for, those that could not be parsed among them."""
        return len(self.message.get("tool_calls") or ()) + self.num_failed_tool_calls


class Rendering(Protocol):
    """How the messages of a model are written."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn of the model, besides those of the run's sampling.stop."""

    @property
    def separator(self) -> str:
        """Between two messages of a transcript."""

    def count(self, text: str) -> int:
        """Tokens of a text within a message."""

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """The whole prompt, behind which the assistant's turn is sampled; CallRefusedError if it cannot be rendered."""

    def continuation(
        self,
        path_ids: Sequence[int],
        turn_start: int,
        before: Sequence[Message],
        new: Sequence[Message],
        tools: Sequence[Tool],
    ) -> list[int] | None:
        """What follows a recorded path, so that the model reads `new` and answers; None: it cannot be known.

        path_ids: a prompt, and from `turn_start` on the turn that was sampled behind it, which is the last message of
        `before`. If the turn has no end, because it was cut by its length, what follows ends it.
        """

    def parse(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], finish_reason: FinishReason, tools: Sequence[Tool]
    ) -> Parsed:
        """The sampled turn as a message. It never fails for what the model wrote."""

    def token_text(self, token_id: int) -> str:
        """The text of one token, also of one that ends a turn."""

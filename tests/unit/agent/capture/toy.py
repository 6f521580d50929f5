"""A rendering of one token per character, for properties of the tree."""

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.contracts.vocabulary import FinishReason
from penstock_agent.capture.messages import Message, Tool, text_of
from penstock_agent.capture.rendering import Parsed

END = 1


@dataclass
class ToyRendering:
    """`role:content` of each message, and a token that ends it. Answers of upper case are written in lower case.

    strips: earlier answers lose what stands before a `!`. known: whether it knows continuations.
    """

    known: bool = True
    strips: bool = False
    shows_tools: bool = True
    stop_token_ids: tuple[int, ...] = (END,)
    separator: str = "|"

    def count(self, text: str) -> int:
        return len(text)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        shown = [ord(letter) for letter in "".join(str(tool) for tool in tools)] if self.shows_tools else []
        return shown + self._written(messages) + [ord(letter) for letter in "assistant:"]

    def continuation(
        self,
        path_ids: Sequence[int],
        turn_start: int,
        before: Sequence[Message],
        new: Sequence[Message],
        tools: Sequence[Tool],
    ) -> list[int] | None:
        if not self.known:
            return None
        end = [END] if path_ids[-1] != END else []
        return end + self._written(new) + [ord(letter) for letter in "assistant:"]

    def parse(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], finish_reason: FinishReason, tools: Sequence[Tool]
    ) -> Parsed:
        text = "".join(chr(token) for token in token_ids if token != END)
        return Parsed({"role": "assistant", "content": text.lower()}, text)

    def token_text(self, token_id: int) -> str:
        return "<end>" if token_id == END else chr(token_id)

    def _written(self, messages: Sequence[Message]) -> list[int]:
        token_ids: list[int] = []
        for message in messages:
            content = text_of(message["content"])
            if self.strips and message["role"] == "assistant":
                content = content.rpartition("!")[2]
            token_ids += [ord(letter) for letter in f"{message['role']}:{content}"] + [END]
        return token_ids

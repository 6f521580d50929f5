"""A model that answers from a script: `ChatSession` without a gateway."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from penstock.contracts.vocabulary import Cut
from penstock_agent.environments.episode import EpisodeCutError, Message, Tool

Answer = str | Message | Exception | Callable[[Sequence[Message]], str]


class ScriptedSession:
    """Answers in their order, and after the last one the cut.

    An answer is a text, a message, an error that is raised, or a function of the messages.
    """

    def __init__(self, *answers: Answer, cut: Cut = "max_turns", name: str = "ticket 1, episode 0") -> None:
        self._answers = list(answers)
        self._last = cut
        self.name = name
        self.base_url = "http://127.0.0.1:9/v1"
        self.api_key = "psk_key-of-the-episode"
        self.reward: float | None = None
        self.cut: Cut | None = None
        self.num_turns = 0
        self.messages: list[Message] = []
        """Those of the last call."""
        self.tools: list[Tool] = []

    async def chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Message:
        return self.answer(messages, tools)

    def answer(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Message:
        """The next answer of the script."""
        self.messages, self.tools = list(messages), list(tools)
        if not self._answers:
            self.cut = self._last
            raise EpisodeCutError(self._last)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        self.num_turns += 1
        if callable(answer):
            answer = answer(messages)
        return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer

    @property
    def contents(self) -> list[tuple[str, str]]:
        """Role and content of each message of the last call."""
        return [(message["role"], message.get("content") or "") for message in self.messages]


def calls(*wanted: tuple[str, Any]) -> Message:
    """A message with tool calls: name and arguments of each (arguments that are text stay as they are)."""
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": f"call_{index}",
                "type": "function",
                "function": {
                    "name": name,
                    "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
                },
            }
            for index, (name, arguments) in enumerate(wanted)
        ],
    }

"""What an environment's driver plays with: the session of its episode, and what it waits for.

Owns the translation between both rooms. Invariant: no call is asked for after `cut`.
"""

from collections.abc import Sequence
from typing import Protocol

from penstock.contracts.vocabulary import Cut
from penstock_agent.capture.messages import Message, Tool
from penstock_agent.environments.episode import EpisodeCutError
from penstock_agent.gateway import refusals
from penstock_agent.gateway.answers import ChatAnswer
from penstock_agent.gateway.requests import ChatRequest


class AgentSession(Protocol):
    """The part of `gateway.Session` that an environment uses."""

    reward: float | None
    end: Cut | None
    key: str
    own_base_url: str
    num_turns: int

    async def chat(self, request: ChatRequest) -> ChatAnswer: ...


class Conversation:
    """One attempt at an episode, as `environments.ChatSession`."""

    def __init__(self, session: AgentSession, name: str) -> None:
        self.name = name
        self._session = session

    @property
    def base_url(self) -> str:
        """The one with the key in it: agents that send a key of their own reach their episode too."""
        return self._session.own_base_url

    @property
    def api_key(self) -> str:
        return self._session.key

    @property
    def reward(self) -> float | None:
        return self._session.reward

    @property
    def cut(self) -> Cut | None:
        return self._session.end

    @property
    def num_turns(self) -> int:
        return self._session.num_turns

    async def chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Message:
        """The model's next message; EpisodeCutError at a limit."""
        request = ChatRequest(messages=list(messages), tools=list(tools))
        try:
            answer = await self._session.chat(request)
        except refusals.EpisodeCutError as error:
            raise EpisodeCutError(error.end) from None
        return answer.message

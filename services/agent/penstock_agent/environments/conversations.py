"""Drivers of classes: the service speaks to the model, and the environment answers.

    steps:  prompt and reset -> model -> step -> model -> step ... until step returns a number
    tools:  prompt and reset -> model -> its tool calls, in order -> model ... until an answer without calls

A class's messages are the row's prompt, then what reset returned; texts become messages of the user.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.config import AgentSection
from penstock.contracts import Score
from penstock.contracts.vocabulary import Cut
from penstock.errors import PenstockError
from penstock_agent.environments.episode import (
    ChatSession,
    Ending,
    Environment,
    EpisodeCutError,
    Message,
    Row,
    Tool,
    unfitting,
)
from penstock_agent.environments.messages import Value
from penstock_agent.environments.pool import WorkerPool
from penstock_agent.environments.worker import BrokenEpisodeError, EnvironmentWorker

UNREAD = 0.0
"""Score of tools without `get_reward`: no reward function of the run reads it, as `check_environment` makes sure."""


class _Conversation:
    """The messages of one episode."""

    def __init__(self, worker: EnvironmentWorker, session: ChatSession, tools: Sequence[Tool]) -> None:
        self._session = session
        self._tools = tools
        self.worker = worker
        self.messages: list[Message] = []
        self.last_text = ""
        self.has_answer = False

    async def begin(self, row: Row) -> None:
        """The first messages: the row's prompt, and what reset returned."""
        observation = await self.worker.begin(row)
        self.messages = [*prompt_messages(row), *observed(observation)]
        if not self.messages:
            raise BrokenEpisodeError("the row has no prompt and reset returned none; expected one of them")

    async def ask(self) -> Message:
        """The model's answer to all messages, which is added to them."""
        try:
            answer = await self._session.chat(self.messages, self._tools)
        except PenstockError as error:
            raise BrokenEpisodeError(f"a call of the model failed: {error}") from error
        self.messages.append(answer)
        self.last_text, self.has_answer = text_of(answer), True
        return answer


class ClassDriver:
    """Runs the episodes of a class, of kind steps or tools."""

    def __init__(self, section: AgentSection, environment: Environment, pool: WorkerPool) -> None:
        self._section = section
        self._environment = environment
        self._pool = pool

    async def run(self, row: Row, session: ChatSession) -> Ending:
        """One episode; see `episode.Driver`."""
        try:
            async with self._pool.worker(session.name) as worker:
                talk = _Conversation(worker, session, self._environment.tools)
                await talk.begin(row)
                return await (self._steps(talk) if self._environment.kind == "steps" else self._use_tools(talk))
        except BrokenEpisodeError as error:
            return Ending(Score(None, str(error)), error.end)

    async def _steps(self, talk: _Conversation) -> Ending:
        while True:
            try:
                await talk.ask()
            except EpisodeCutError as error:
                return Ending(await self._cut_score(talk, error.cut), error.cut)
            value = await talk.worker.step(talk.last_text)
            if isinstance(value, float):
                return Ending(Score(value), "done")
            talk.messages += observed(value)

    async def _use_tools(self, talk: _Conversation) -> Ending:
        num_failed = 0
        while True:
            try:
                calls = (await talk.ask()).get("tool_calls") or []
            except EpisodeCutError as error:
                return Ending(await self._cut_score(talk, error.cut), error.cut, num_failed)
            if not calls:
                return Ending(await self._score(talk), "done", num_failed)
            for call in calls:
                message, failed = await _tool_message(talk.worker, call)
                talk.messages.append(message)
                num_failed += failed

    async def _score(self, talk: _Conversation, otherwise: float = UNREAD) -> Score:
        if self._environment.has_get_reward:
            return Score(await talk.worker.get_reward(talk.last_text))
        return Score(otherwise)

    async def _cut_score(self, talk: _Conversation, cut: Cut) -> Score:
        return await self._score(talk, self._section.cut_score) if talk.has_answer else unfitting(cut)


async def _tool_message(worker: EnvironmentWorker, call: Mapping[str, Any]) -> tuple[Message, bool]:
    """The answer to one of the model's calls, and whether it is an error."""
    function = call["function"]
    arguments = function.get("arguments") or ""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    answer = await worker.use_tool(function["name"], text)
    message = {"role": "tool", "tool_call_id": call.get("id", ""), "name": function["name"], "content": answer.text}
    return message, answer.failed


def prompt_messages(row: Row) -> list[Message]:
    """The row's prompt as messages: a text is one of the user; none if the row has no prompt."""
    return observed(row.get("prompt") or None)


def observed(value: Value) -> list[Message]:
    """What an environment returned, as messages: a text is one of the user."""
    if isinstance(value, list):
        return value
    return [] if value is None else [{"role": "user", "content": str(value)}]


def text_of(message: Message) -> str:
    """The text of a message of the model, without its thinking and its calls."""
    content = message.get("content")
    return content if isinstance(content, str) else ""

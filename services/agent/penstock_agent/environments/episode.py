"""What an environment is, what it plays an episode with, and how an episode ends.

Owns the interface of this room: drivers run episodes of an `Environment` with a `ChatSession`, and return an `Ending`.

The boundary of failures: what the model does is scored (`end` done, max_turns or max_tokens); what the environment or
the infrastructure does is a failure with its reason (`end` failure or timeout), and the episode may be tried again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from penstock.contracts import EpisodeEnd, Score
from penstock.contracts.vocabulary import Cut

Message = dict[str, Any]
"""An OpenAI chat message."""
Tool = dict[str, Any]
"""A tool in OpenAI's form."""
Row = dict[str, Any]
"""A row of the dataset: `prompt` (text or messages) if it has one, `answer`, and its metadata."""
Kind = Literal["steps", "tools", "function", "command"]
"""steps: a class with `step`; tools: a class whose public methods are tools; function: it runs an agent of its own;
command: a program that does."""


class EpisodeCutError(Exception):
    """A call of the model that would exceed a limit of the episode: raised by `ChatSession.chat`."""

    def __init__(self, cut: Cut) -> None:
        super().__init__(f"the episode has reached agent.{cut}")
        self.cut = cut


class ChatSession(Protocol):
    """An episode's conversation with the model."""

    @property
    def name(self) -> str:
        """The episode, for people: its output is logged under this name."""

    @property
    def base_url(self) -> str:
        """For an OpenAI client, with `api_key`."""

    @property
    def api_key(self) -> str: ...

    @property
    def reward(self) -> float | None:
        """The last one that the agent gave by PUT {base_url}/reward."""

    @property
    def cut(self) -> Cut | None:
        """The limit that a call has exceeded; None: none."""

    @property
    def num_turns(self) -> int:
        """Answers of the model so far."""

    async def chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> Message:
        """The model's next message. EpisodeCutError at a limit; PenstockError if the call is refused or fails."""


@dataclass(frozen=True)
class Environment:
    """What `agent.environment` or `agent.command` names, as `check_environment` found it.

    description: the first line of its docstring, or the command. tools: empty unless kind is tools. has_get_reward:
    whether an episode that was cut is scored by it.
    """

    kind: Kind
    description: str
    tools: tuple[Tool, ...] = ()
    has_get_reward: bool = False


@dataclass(frozen=True)
class Ending:
    """How an episode ended.

    score: the environment's, or a failure. num_failed_tool_calls: calls that the environment answered with an error.
    """

    score: Score
    end: EpisodeEnd
    num_failed_tool_calls: int = 0


class Driver(Protocol):
    """Runs the episodes of one environment."""

    async def run(self, row: Row, session: ChatSession) -> Ending:
        """One episode, from its first message to its score; many may run at once.

        It has no deadline of its own: the caller cancels it at `agent.timeout_seconds`, and nothing is left behind.
        """


def unfitting(cut: Cut) -> Score:
    """The score of an episode whose first call was refused at a limit: the model has done nothing."""
    return Score(None, f"the first call of the model does not fit agent.{cut}")

"""The messages between an environment's worker process and the service.

service                    worker process
Load --------------------->           imports the environment
     <-------------------- Loaded | Refused
Begin -------------------->           a class: a new instance, and its reset
     <-------------------- Returned | Raised
Step | UseTool | GetReward ->
     <-------------------- Returned | ToolAnswer | Raised
RunFunction -------------->           a function: the full episode
     <-------------------- Returned | Raised
Finish ------------------->           close(), and what the episode left running in the loop
     <-------------------- Returned | Raised
"""

from typing import Any, Literal

from penstock.workers.frames import Message

Value = str | float | list[dict[str, Any]] | None
"""What a method returned: text, a finite number, messages, or nothing."""


class Load(Message, frozen=True, tag="load"):
    """First frame: import `environment` (module:name), with `modules_path` on the import path."""

    environment: str
    modules_path: str


class Loaded(Message, frozen=True, tag="loaded"):
    """What it is; tools in OpenAI's form, as JSON."""

    kind: Literal["steps", "tools", "function"]
    description: str
    tools: str
    has_get_reward: bool


class Refused(Message, frozen=True, tag="refused"):
    """It cannot be loaded or used."""

    reason: str


class Begin(Message, frozen=True, tag="begin"):
    """A new episode."""

    row: dict[str, Any]


class Step(Message, frozen=True, tag="step"):
    """The model's text."""

    text: str


class UseTool(Message, frozen=True, tag="use_tool"):
    """One call of a tool. arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class GetReward(Message, frozen=True, tag="get_reward"):
    """The score is asked for. text: the model's last one."""

    text: str


class RunFunction(Message, frozen=True, tag="run_function"):
    """A full episode of a function."""

    row: dict[str, Any]
    base_url: str
    api_key: str


class Finish(Message, frozen=True, tag="finish"):
    """The episode has ended."""


class Returned(Message, frozen=True, tag="returned"):
    """What the method returned."""

    value: Value


class ToolAnswer(Message, frozen=True, tag="tool_answer"):
    """The text that the model reads. failed: it says what was wrong with the call."""

    text: str
    failed: bool


class Raised(Message, frozen=True, tag="raised"):
    """The environment failed: type, message and place of the exception, or what was wrong with the returned value."""

    reason: str


ToChild = Load | Begin | Step | UseTool | GetReward | RunFunction | Finish
FromChild = Loaded | Refused | Returned | ToolAnswer | Raised

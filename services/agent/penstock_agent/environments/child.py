"""The worker process: one user's object, and one episode of it at a time, in its main thread.

Invariant: every exception and every result of the user's code becomes an answer. The parent (`worker`) ends the process
at the deadline of a call; this module measures no deadlines.
"""

import asyncio
import inspect
import os
import sys
from typing import Any

import msgspec

from penstock.errors import ConfigError, DataError, EpisodeFailedError
from penstock.workers.child import ServicePipe, open_pipe
from penstock.workers.frames import Message
from penstock.workers.results import as_number, describe, finite_number, summary
from penstock_agent.environments.loading import UserObject, accepted_columns, load, takes_text
from penstock_agent.environments.messages import (
    Begin,
    Finish,
    GetReward,
    Load,
    Loaded,
    Raised,
    Refused,
    Returned,
    RunFunction,
    Step,
    ToChild,
    ToolAnswer,
    UseTool,
    Value,
)
from penstock_agent.environments.tools import ArgumentsError, as_text

INFRASTRUCTURE = (EpisodeFailedError, MemoryError)
"""What a tool raises if the model is not at fault."""
FIRST_OBSERVATION = "text, a list of messages, or None"
OBSERVATION_OR_END = "text, a list of messages, or a number"


class UnusableError(Exception):
    """What the user's code returned, or a row, cannot be used."""


def main() -> None:
    """`child.py SOCKET_FD PARENT_PID`: serve episodes until the pipe ends."""
    pipe = open_pipe()
    with asyncio.Runner() as runner:
        EpisodeLoop(pipe, runner).serve()


class EpisodeLoop:
    """Loads the object, and makes the calls that the service asks for, one after another."""

    def __init__(self, pipe: ServicePipe, runner: asyncio.Runner) -> None:
        self._pipe = pipe
        self._runner = runner
        self._object: UserObject | None = None
        self._folder = ""
        self._instance: Any = None
        self._working_folder = ""

    def serve(self) -> None:
        """Answer each message, without end."""
        while True:
            message = msgspec.msgpack.decode(self._pipe.receive(), type=ToChild)
            answer = self._load(message) if isinstance(message, Load) else self._answer(message)
            try:
                self._pipe.send(answer)
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                self._pipe.send(Raised(f"returned what cannot be packed: {summary(error)}; expected plain JSON"))

    def _load(self, message: Load) -> Loaded | Refused:
        self._folder = message.modules_path
        sys.path.insert(0, message.modules_path)
        try:
            found = self._object = load(message.environment)
            self._working_folder = os.getcwd()
            tools = msgspec.json.encode([tool.schema for tool in found.tools.values()]).decode()
        except ConfigError as error:
            return Refused(str(error))
        except BaseException as error:
            # An exception of the user's module at import, sys.exit() included, is a reason and never ends this process.
            return Refused(f"it cannot be imported: {describe(error, __file__, self._folder)}")
        return Loaded(found.kind, found.description, tools, found.has_get_reward)

    def _answer(self, message: Message) -> Message:
        try:
            match message:
                case Begin():
                    return Returned(self._begin(message.row))
                case Step():
                    return Returned(_observation(self._result(self._instance.step(message.text)), OBSERVATION_OR_END))
                case UseTool():
                    return self._use_tool(message)
                case GetReward():
                    method = self._instance.get_reward
                    value = self._result(method(message.text) if takes_text(method) else method())
                    return Returned(_number(value))
                case RunFunction():
                    return Returned(self._run_function(message))
                case Finish():
                    self._finish()
                    return Returned(None)
                case _:
                    raise TypeError(f"an unexpected message {type(message).__name__}")
        except UnusableError as error:
            return Raised(str(error))
        except BaseException as error:
            # Likewise: SystemExit and KeyboardInterrupt too are a failure of this episode.
            return Raised(describe(error, __file__, self._folder))

    def _result(self, value: Any) -> Any:
        """The value, or that of the coroutine."""
        return self._runner.run(_awaited(value)) if inspect.isawaitable(value) else value

    def _begin(self, row: dict[str, Any]) -> Value:
        assert self._object is not None, "Load comes first"
        os.chdir(self._working_folder)  # the episode before may have left it
        self._instance = self._object.make()
        if not hasattr(self._instance, "reset"):
            return None
        reset = self._instance.reset
        try:
            columns = accepted_columns(reset, row)
        except DataError as error:
            raise UnusableError(str(error)) from None
        return _observation(self._result(reset(**columns)), FIRST_OBSERVATION)

    def _use_tool(self, message: UseTool) -> ToolAnswer:
        """The tool's answer. An error is one too, for the model to read: its call may have been wrong."""
        assert self._object is not None, "Load comes first"
        tool = self._object.tools.get(message.name)
        try:
            if tool is None:
                names = ", ".join(self._object.tools)
                raise ArgumentsError(f"there is no tool {message.name}; expected one of {names}")
            value = self._result(getattr(self._instance, message.name)(**tool.parse(message.arguments)))
        except INFRASTRUCTURE:
            raise
        except ArgumentsError as error:
            return ToolAnswer(f"Error: {error}", failed=True)
        except Exception as error:
            return ToolAnswer(f"Error: {summary(error)}", failed=True)
        try:
            return ToolAnswer(as_text(value), failed=False)
        except (TypeError, ValueError, RecursionError) as error:  # the tool's fault: no call of the model helps
            raise UnusableError(
                f"returned {type(value).__name__}, which is no JSON: {summary(error)}; expected text or plain JSON"
            ) from None

    def _run_function(self, message: RunFunction) -> Value:
        assert self._object is not None, "Load comes first"
        os.chdir(self._working_folder)
        value = self._result(self._object.make(row=message.row, base_url=message.base_url, api_key=message.api_key))
        return None if value is None else _number(value)

    def _finish(self) -> None:
        instance, self._instance = self._instance, None
        try:
            if instance is not None and hasattr(instance, "close"):
                self._result(instance.close())
        finally:
            self._runner.run(_cancel_others())


def _observation(value: Any, expected: str) -> Value:
    """What reset or step returned: text, messages, nothing after reset, a finite number after step."""
    if isinstance(value, str) or (value is None and expected == FIRST_OBSERVATION):
        return value
    if isinstance(value, list | tuple):
        wrong = [each for each in value if not (isinstance(each, dict) and isinstance(each.get("role"), str))]
        if wrong or not value:
            shown = f"{type(wrong[0]).__name__} in a list" if wrong else "an empty list"
            raise UnusableError(f"returned {shown}; expected messages, each a dict with a role")
        return list(value)
    if as_number(value) is None or expected == FIRST_OBSERVATION:
        raise UnusableError(f"returned {type(value).__name__}; expected {expected}")
    return _number(value)


def _number(value: Any) -> float:
    try:
        return finite_number(value)
    except ValueError as error:
        raise UnusableError(str(error)) from None


async def _awaited(value: Any) -> Any:
    return await value


async def _cancel_others() -> None:
    """End what the episode left running, so that it does not reach into the next one."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    main()

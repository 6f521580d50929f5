"""One worker process as the service sees it: it loads the environment, and plays one episode after another.

Invariants: no method of a class waits longer than `agent.call_timeout_seconds`; a process that missed a deadline, has
ended or raised is never used for another episode (`reusable`).
"""

import asyncio
import logging
from pathlib import Path
from typing import Literal

import msgspec

import penstock_agent
from penstock.absent_path import looked_for
from penstock.config import AgentSection
from penstock.errors import ConfigError
from penstock.workers.frames import Message
from penstock.workers.guard import GroupGuard
from penstock.workers.process import BrokenWorkerError, ChildProcess
from penstock_agent.environments.episode import Environment, Row, Tool
from penstock_agent.environments.messages import (
    Begin,
    Finish,
    FromChild,
    GetReward,
    Load,
    Loaded,
    Raised,
    Refused,
    Returned,
    RunFunction,
    Step,
    ToolAnswer,
    UseTool,
    Value,
)

log = logging.getLogger(__name__)

LOAD_SECONDS = 120.0  # imports: a user's torch takes a minute on a cold disk
TITLE = "environment worker"
CHILD = "penstock_agent.environments.child"


class BrokenEpisodeError(Exception):
    """The environment or its process failed; the message is the reason."""

    def __init__(self, reason: str, end: Literal["failure", "timeout"] = "failure") -> None:
        super().__init__(reason)
        self.end = end


class RaisedError(BrokenEpisodeError):
    """The user's code raised an exception, or returned something that cannot be used."""


class EndedAtImportError(ConfigError):
    """The process ended while it imported the environment: by the module, or by the host (no memory, a signal)."""


class EnvironmentWorker:
    """A child process that holds one environment of kind steps, tools or function. Made by `start_worker`."""

    environment: Environment
    """What it has loaded."""

    def __init__(self, section: AgentSection, guard: GroupGuard | None) -> None:
        """ConfigError if it cannot be started."""
        self._section = section
        self._guard = guard
        try:
            self._child = ChildProcess(TITLE, CHILD, penstock_agent, FromChild)
        except OSError as error:
            raise ConfigError(f"cannot start a process for agent.environment: {error}") from None
        if guard is not None:
            guard.watch(self.pid)
        self._raised = False

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def usable(self) -> bool:
        """Whether it can be called."""
        return self._child.usable and not self._child.has_ended

    @property
    def reusable(self) -> bool:
        """Whether a further episode may use it."""
        return self.usable and not self._raised

    async def load(self) -> None:
        """Import the environment; comes first. ConfigError naming agent.environment if it cannot be used."""
        section = self._section
        named = f"agent.environment names {section.environment!r}"
        folder = modules_folder(section)
        await self._child.connect()
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await self._child.send(Load(section.environment, str(folder)))
                answer: Loaded | Refused = await self._child.receive(Loaded, Refused)
        except TimeoutError:
            raise ConfigError(
                f"{named}, which was not imported within {LOAD_SECONDS:g} s; expected a module that imports faster"
            ) from None
        except BrokenWorkerError as error:
            raise EndedAtImportError(
                f"{named}; the process that imports it {error}; it wrote: {self._child.output.tail or 'nothing'}"
            ) from None
        if isinstance(answer, Refused):
            raise ConfigError(f"{named}: {answer.reason} (modules are imported from agent.modules_path, {folder})")
        self._child.usable = True
        tools: tuple[Tool, ...] = tuple(msgspec.json.decode(answer.tools))
        self.environment = Environment(answer.kind, answer.description, tools, answer.has_get_reward)

    def name_output(self, episode: str) -> None:
        """Log what it writes from now on as that of an episode."""
        self._child.read_output()
        self._child.output.rename(f"environment of {episode}" if episode else TITLE)

    async def begin(self, row: Row) -> Value:
        """Make an instance and reset it; its first observation."""
        return await self._value(Begin(row), "reset")

    async def step(self, text: str) -> Value:
        """The observation after the model's text, or the score as a float."""
        return await self._value(Step(text), "step")

    async def use_tool(self, name: str, arguments: str) -> ToolAnswer:
        """The tool's answer; arguments: JSON."""
        answer = await self._call(UseTool(name, arguments), f"tool {name}")
        if not isinstance(answer, ToolAnswer):
            raise self._out_of_turn(f"tool {name}", answer)
        return answer

    async def get_reward(self, text: str) -> float:
        """The score, a finite number; text: the model's last one."""
        value = await self._value(GetReward(text), "get_reward")
        if not isinstance(value, float):
            raise self._out_of_turn("get_reward", value)
        return value

    async def run_function(self, row: Row, base_url: str, api_key: str) -> float | None:
        """The full episode of a function; what it returned. Without a deadline."""
        name = self._section.environment
        value = await self._value(RunFunction(row, base_url, api_key), name, timed=False)
        if not (value is None or isinstance(value, float)):
            raise self._out_of_turn(name, value)
        return value

    async def finish(self) -> None:
        """End the episode: close(), if the class has it."""
        await self._value(Finish(), "close")

    async def _value(self, message: Message, method: str, *, timed: bool = True) -> Value:
        answer = await self._call(message, method, timed=timed)
        if not isinstance(answer, Returned):
            raise self._out_of_turn(method, answer)
        return answer.value

    async def _call(self, message: Message, what: str, *, timed: bool = True) -> Returned | ToolAnswer:
        """One call and its answer. BrokenEpisodeError if there is none, and then the process is not used again."""
        seconds = self._section.call_timeout_seconds if timed else None
        try:
            async with asyncio.timeout(seconds):
                await self._child.send(message)
                answer: Returned | ToolAnswer | Raised = await self._child.receive(Returned, ToolAnswer, Raised)
        except TimeoutError:
            self._child.kill()
            reason = f"{what} was killed after {seconds:g} s (agent.call_timeout_seconds)"
            raise BrokenEpisodeError(reason, "timeout") from None
        except BrokenWorkerError as error:
            self._child.kill()
            raise BrokenEpisodeError(f"{what}: the environment's process {error}") from None
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise BrokenEpisodeError(f"{what}: its arguments cannot be packed: {error}; expected plain JSON") from None
        if isinstance(answer, Raised):
            self._raised = True
            raise RaisedError(f"{what}: {answer.reason}")
        return answer

    def _out_of_turn(self, what: str, answer: object) -> BrokenEpisodeError:
        self._child.kill()
        return BrokenEpisodeError(f"{what}: the environment's process sent {type(answer).__name__} out of turn")

    async def close(self) -> None:
        """Kill it and release its pipes."""
        try:
            await self._child.close()
        finally:
            if self._guard is not None:
                self._guard.release(self.pid)


async def start_worker(section: AgentSection, guard: GroupGuard | None = None) -> EnvironmentWorker:
    """A worker that has loaded the environment. ConfigError if that fails; nothing is left of it then.

    guard: kills what the environment starts if this process is killed.
    """
    worker = EnvironmentWorker(section, guard)
    try:
        await worker.load()
    except BaseException:
        await worker.close()
        raise
    return worker


def modules_folder(section: AgentSection) -> Path:
    """The folder of the user's modules and programs. ConfigError unless it exists."""
    folder = Path(section.modules_path).resolve()
    if not folder.is_dir():
        raise ConfigError(
            f"agent.modules_path is {section.modules_path!r}; expected an existing folder; "
            f"{looked_for(section.modules_path)}"
        )
    return folder

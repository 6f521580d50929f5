"""The driver of `agent.command`: an episode is a program of the user's that speaks to the model as an OpenAI client.

Invariants: the program and all that it started in its process group are gone when the episode ends, however it ends,
and when the service is killed; it sees no secret of Penstock but the key of its own episode; its output is in the log.
"""

import asyncio
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from penstock.config import AgentSection
from penstock.contracts import Score
from penstock.errors import ConfigError
from penstock.runtime.process import tied_command
from penstock.workers.guard import GroupGuard
from penstock.workers.output import OutputLog
from penstock.workers.process import (
    REAP_SECONDS,
    describe_end,
    environment_without_secrets,
    kill_group,
)
from penstock_agent.environments.agents import settle
from penstock_agent.environments.episode import ChatSession, Ending, Row
from penstock_agent.environments.worker import modules_folder

log = logging.getLogger(__name__)

MAX_VARIABLE_BYTES = 100_000  # Linux starts no program with a longer one than 131072
STDOUT, STDERR = 1, 2
NUM_SHOWN_LINES = 5


class CommandDriver:
    """Runs the episodes of a program."""

    def __init__(self, section: AgentSection, guard: GroupGuard) -> None:
        self._section = section
        self._guard = guard
        self._folder = modules_folder(section)

    async def run(self, row: Row, session: ChatSession) -> Ending:
        """One episode; see `episode.Driver`."""
        text = json.dumps(row, ensure_ascii=False)
        environment = {
            **program_environment(),
            "OPENAI_BASE_URL": session.base_url,
            "OPENAI_API_KEY": session.api_key,
        }
        if len(text.encode()) <= MAX_VARIABLE_BYTES:
            environment["PENSTOCK_ROW"] = text
        program = _Program(session.name, self._guard)
        try:
            code = await program.run(self._section.command, self._folder, environment, text)
        except OSError as error:
            return Ending(Score(None, f"agent.command cannot be started: {error}"), "failure")
        fault = f"the agent {describe_end(code)}; it wrote: {program.last_lines(STDERR)}" if code else ""
        value = session.reward
        if value is None and not fault:
            value = as_reward(program.last_line(STDOUT))
        return settle(session, value, fault, self._section.cut_score)


class _Program(asyncio.SubprocessProtocol):
    """One process: its end, and the end of its output."""

    def __init__(self, episode: str, guard: GroupGuard) -> None:
        self._episode = episode
        self._guard = guard
        self._output = {fd: OutputLog(f"agent of {episode}") for fd in (STDOUT, STDERR)}
        self._exited = asyncio.Event()
        self._closed = asyncio.Event()

    async def run(self, command: tuple[str, ...], folder: Path, environment: dict[str, str], stdin: str) -> int:
        """Start it, and return its exit code; killed with its group if the caller is cancelled."""
        transport, _ = await asyncio.get_running_loop().subprocess_exec(
            lambda: self, *tied_command(command), cwd=folder, env=environment, start_new_session=True
        )
        try:
            self._guard.watch(transport.get_pid())
            pipe = transport.get_pipe_transport(0)
            assert isinstance(pipe, asyncio.WriteTransport)
            pipe.write(stdin.encode())
            pipe.close()
            await self._exited.wait()
        finally:
            kill_group(transport.get_pid())
            self._guard.release(transport.get_pid())
            try:
                async with asyncio.timeout(REAP_SECONDS):  # a process that left the group may hold the pipes open
                    await self._closed.wait()
            except TimeoutError:
                log.warning("agent of %s: a process that it started outside of its group still runs", self._episode)
            finally:
                transport.close()
                for output in self._output.values():
                    output.flush()
        code = transport.get_returncode()
        assert code is not None, "it has exited"
        return code

    def last_line(self, fd: int) -> str:
        """The last line that is not empty."""
        return self.last_lines(fd).rpartition("\n")[2].strip()

    def last_lines(self, fd: int) -> str:
        """The end of what it wrote."""
        return "\n".join(self._output[fd].tail.splitlines()[-NUM_SHOWN_LINES:]) or "nothing"

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._output[fd].write(data)

    def process_exited(self) -> None:
        self._exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()


def as_reward(line: str) -> float | None:
    """The number that is a line; None if it is none."""
    try:
        return float(line)
    except ValueError:
        return None


def program_environment() -> dict[str, str]:
    """The environment of a program: no secrets, and `python` is the service's own unless it has a path."""
    environment = environment_without_secrets()
    environment["PATH"] = os.pathsep.join(
        filter(None, [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    )
    return environment


def check_command(section: AgentSection) -> None:
    """ConfigError naming agent.command if there is no such program."""
    folder = modules_folder(section)
    name = section.command[0]
    found = folder / name if os.sep in name else shutil.which(name, path=program_environment()["PATH"])
    if found is None or shutil.which(found) is None:
        raise ConfigError(
            f"agent.command starts {name!r}, which is no program that can be run in agent.modules_path ({folder}); "
            "expected a name on PATH, or the path of a file that is executable"
        )

"""A worker process as its service sees it: started, sent messages, killed with all that it started.

Invariants: it sees no secret of Penstock; after `kill`, the process and its group are gone and it is never used again
(`usable`); its output is in the log. Waits for answers have no deadline of their own: the caller sets one per call.

Start it from the main thread: the kernel ties the child to the thread that started it.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import msgspec

import penstock
from penstock.workers.frames import LENGTH, Message, frame, frame_length
from penstock.workers.output import OutputLog

log = logging.getLogger(__name__)

REAP_SECONDS = 5.0  # after SIGKILL only the kernel itself can delay the end
OUTPUT_CHUNK_BYTES = 1 << 16
ENV_PREFIX = "PENSTOCK_"

M = TypeVar("M", bound=Message)


class BrokenWorkerError(Exception):
    """The process ended, or sent an invalid answer."""


class ChildProcess:
    """A child process and its two pipes: messages, and its output."""

    def __init__(self, title: str, module: str, package: ModuleType, answers: Any) -> None:
        """OSError if it cannot be started.

        title: what it is, in the log. module: what runs in it; it calls `penstock.workers.child.open_pipe`. package:
        the service's, which is put on its import path. answers: the union of the messages that it sends.
        """
        self.title = title
        self._answers = answers
        self._process, self._socket, self._output_fd = _spawn(module, package)
        self.output = OutputLog(title, self.pid)
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.usable = False
        os.set_blocking(self._output_fd, False)
        asyncio.get_running_loop().add_reader(self._output_fd, self.read_output)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    async def connect(self) -> None:
        """Open the pipe of messages; comes first."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)

    async def send(self, message: Message) -> None:
        """BrokenWorkerError if the process has ended; ValueError if the message is too long."""
        assert self._writer is not None, "connect() comes first"
        data = frame(message)
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            raise BrokenWorkerError(await self._end()) from None

    async def receive(self, *expected: type[M]) -> M:
        """The next message, which is of one of these types; BrokenWorkerError otherwise, or if the process ends."""
        assert self._reader is not None, "connect() comes first"
        try:
            header = await self._reader.readexactly(LENGTH.size)
            data = await self._reader.readexactly(frame_length(header))
            message = msgspec.msgpack.decode(data, type=self._answers)
        except (asyncio.IncompleteReadError, OSError):
            raise BrokenWorkerError(await self._end()) from None
        except (ValueError, msgspec.DecodeError) as error:
            raise BrokenWorkerError(f"sent an invalid answer ({error})") from None
        if not isinstance(message, expected):
            raise BrokenWorkerError(f"sent {type(message).__name__} out of turn")
        return message

    async def _end(self) -> str:
        """How the process ended, after it closed its pipe."""
        try:
            code = await asyncio.to_thread(self._process.wait, REAP_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        self.read_output()  # its last lines may still be in the pipe
        return describe_end(code)

    def read_output(self) -> None:
        """Its standard output and error up to now, into the log."""
        try:
            data = os.read(self._output_fd, OUTPUT_CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._output_fd)
            return
        self.output.write(data)

    def kill(self) -> None:
        """End it and its process group now; safe to repeat."""
        self.usable = False
        kill_group(self.pid)

    async def close(self) -> None:
        """Kill, reap and release the pipes; a cancelled caller leaves nothing open either."""
        self.kill()
        # Handed to its thread at once and shielded: a wait that is cancelled in the thread's queue would never reap.
        reaped = asyncio.get_running_loop().run_in_executor(None, self._process.wait, REAP_SECONDS)
        try:
            await asyncio.shield(reaped)
        except subprocess.TimeoutExpired:
            log.error("%s %d still lives %g s after SIGKILL", self.title, self.pid, REAP_SECONDS)
        finally:
            self._release()

    def _release(self) -> None:
        self.read_output()
        self.output.flush()
        asyncio.get_running_loop().remove_reader(self._output_fd)
        os.close(self._output_fd)
        if self._writer is not None:
            self._writer.close()
        self._socket.close()


def kill_group(pid: int) -> None:
    """End a process group now; nothing if it has ended."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # the group has ended (macOS answers EPERM for zombies)


def describe_end(code: int) -> str:
    """How a process ended, from the exit code that `subprocess` gives."""
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


def environment_without_secrets() -> dict[str, str]:
    """This process's environment without Penstock's variables, since those hold secrets and users' code sees the rest.

    With output that is not held back, so that the output of a killed process is in the log.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def _spawn(module: str, package: ModuleType) -> tuple["subprocess.Popen[bytes]", socket.socket, int]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            pass_fds=(theirs.fileno(),),
            env=_environment((penstock, package)),
            start_new_session=True,
        )
    except OSError:
        ours.close()
        os.close(reading)
        raise
    finally:
        theirs.close()
        os.close(writing)
    return process, ours, reading


def _environment(packages: Iterable[ModuleType]) -> dict[str, str]:
    environment = environment_without_secrets()
    ours = [str(Path(module.__file__ or "").resolve().parent.parent) for module in packages]
    environment["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, [environment.get("PYTHONPATH", "")])])
    environment.setdefault("OMP_NUM_THREADS", "1")  # the workers run in parallel instead
    return environment

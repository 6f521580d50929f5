"""One worker process as the service sees it: started, given batches, read until the deadline of each call, killed.

Invariants: no method waits longer than its deadlines; after the first error the process and all its descendants are
killed, and it is never used again (`usable`).

Start it from the main thread: the kernel ties the child to the thread that started it.
"""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import msgspec

import penstock
import penstock_reward
from penstock.errors import RewardError
from penstock_reward.processes.messages import (
    LENGTH,
    Accepted,
    Call,
    CallBatch,
    FailureKind,
    FromChild,
    Message,
    Outcome,
    Refused,
    Start,
    Started,
    frame,
    frame_length,
)

log = logging.getLogger(__name__)

LOAD_SECONDS = 120.0  # imports: reasoning_gym takes 3 s, a user's torch a minute on a cold disk
REAP_SECONDS = 5.0  # after SIGKILL only the kernel itself can delay the end
OUTPUT_CHUNK_BYTES = 1 << 16
MAX_LOGGED_CHARS = 2000
ENV_PREFIX = "PENSTOCK_"

M = TypeVar("M", bound=Message)


class BrokenWorkerError(Exception):
    """The process ended, or sent an invalid answer."""


class WorkerProcess:
    """A child process and its two pipes."""

    def __init__(self, timeout_seconds: float) -> None:
        """`timeout_seconds`: the deadline of each call."""
        self._timeout_seconds = timeout_seconds
        self._process, self._socket, self._output = _spawn()
        self._tail = ""
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.usable = False
        os.set_blocking(self._output, False)
        asyncio.get_running_loop().add_reader(self._output, self._read_output)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def start(self, start: Start) -> dict[str, str]:
        """Load the functions; returns their descriptions. RewardError with the reason if that fails."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        answer: Started | Refused
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await self._send(start)
                answer = await self._receive(Started, Refused)
        except TimeoutError:
            raise RewardError(
                f"reward.functions {', '.join(start.functions)}: not loaded within {LOAD_SECONDS:g} s; "
                "expected modules that import faster"
            ) from None
        except BrokenWorkerError as error:
            raise RewardError(
                f"reward.functions {', '.join(start.functions)}: the worker process that loads them {error}; "
                f"it wrote: {self._tail.strip()[-MAX_LOGGED_CHARS:] or 'nothing'}"
            ) from None
        if isinstance(answer, Refused):
            raise RewardError(
                f"reward.functions names {answer.function!r}, which cannot be loaded: {answer.reason}; expected a "
                f"built-in name, or module:function with the module under reward.modules_path ({start.modules_path!r})"
            )
        self.usable = True
        return answer.descriptions

    async def run(self, batch: CallBatch) -> list[Outcome]:
        """Outcomes of the calls in order. Fewer than calls if the process is lost: the last one then failed.

        An empty list if it was lost before the first call began: no call was at fault, and all may be repeated.
        """
        outcomes: list[Outcome] = []
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                await self._send(batch)
                await self._receive(Accepted)
        except (TimeoutError, BrokenWorkerError) as error:
            log.warning("reward worker %d was lost before a call: %s", self.pid, error or "no answer")
            self.kill()
            return outcomes
        for call in batch.calls:
            outcome = await self._outcome(call)
            outcomes.append(outcome)
            if not self.usable:
                break
        return outcomes

    async def _outcome(self, call: Call) -> Outcome:
        began = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await self._receive(Outcome)
        except TimeoutError:
            kind: FailureKind = "timeout"
            reason = f"killed after {self._timeout_seconds:g} s (reward.timeout_seconds)"
        except BrokenWorkerError as error:
            kind, reason = "died", f"the worker process {error} during the call"
        self.kill()
        log.warning("reward function %s: %s", call.function, reason)
        return Outcome(None, asyncio.get_running_loop().time() - began, kind, reason)

    async def _send(self, message: Message) -> None:
        assert self._writer is not None, "start() comes first"
        try:
            self._writer.write(frame(message))
            await self._writer.drain()
        except OSError:
            raise BrokenWorkerError(await self._end()) from None

    async def _receive(self, *expected: type[M]) -> M:
        assert self._reader is not None, "start() comes first"
        try:
            header = await self._reader.readexactly(LENGTH.size)
            data = await self._reader.readexactly(frame_length(header))
            message = msgspec.msgpack.decode(data, type=FromChild)
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
        self._read_output()  # its last lines may still be in the pipe
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")

    def _read_output(self) -> None:
        """Standard output and error of the functions, into the log."""
        try:
            data = os.read(self._output, OUTPUT_CHUNK_BYTES)
        except BlockingIOError:
            return
        if not data:
            asyncio.get_running_loop().remove_reader(self._output)
            return
        text = data.decode("utf-8", "replace")
        self._tail = (self._tail + text)[-MAX_LOGGED_CHARS:]
        log.info("reward function wrote: %s", text.rstrip()[:MAX_LOGGED_CHARS], extra={"worker_pid": self.pid})

    def kill(self) -> None:
        """End it and its process group now; safe to repeat."""
        self.usable = False
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # the group has ended (macOS answers EPERM for zombies)

    async def close(self) -> None:
        """Kill, reap and release the pipes; a cancelled caller leaves nothing open either."""
        self.kill()
        # Handed to its thread at once and shielded: a wait that is cancelled in the thread's queue would never reap.
        reaped = asyncio.get_running_loop().run_in_executor(None, self._process.wait, REAP_SECONDS)
        try:
            await asyncio.shield(reaped)
        except subprocess.TimeoutExpired:
            log.error("reward worker %d still lives %g s after SIGKILL", self.pid, REAP_SECONDS)
        finally:
            self._release()

    def _release(self) -> None:
        self._read_output()
        asyncio.get_running_loop().remove_reader(self._output)
        os.close(self._output)
        if self._writer is not None:
            self._writer.close()
        self._socket.close()


def _spawn() -> tuple["subprocess.Popen[bytes]", socket.socket, int]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "penstock_reward.processes.child", str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            pass_fds=(theirs.fileno(),),
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        ours.close()
        os.close(reading)
        raise RewardError(f"cannot start a reward worker with {sys.executable}: {error}") from None
    finally:
        theirs.close()
        os.close(writing)
    return process, ours, reading


def _environment() -> dict[str, str]:
    """This process's environment without Penstock's variables, since those hold secrets and functions see the rest."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENV_PREFIX)}
    ours = [str(Path(module.__file__ or "").resolve().parent.parent) for module in (penstock, penstock_reward)]
    environment["PYTHONPATH"] = os.pathsep.join([*ours, *filter(None, [environment.get("PYTHONPATH", "")])])
    environment["PYTHONUNBUFFERED"] = "1"  # so that the output of a killed function is in the log
    environment.setdefault("OMP_NUM_THREADS", "1")  # the workers run in parallel instead
    return environment

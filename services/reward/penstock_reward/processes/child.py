"""The worker process: runs reward functions, one call after another, in its main thread.

Owns the calls. Invariants: it dies with its parent (the kernel's signal on Linux, the end of the pipe everywhere);
every exception and every result of a function becomes an Outcome; standard output carries no protocol, so functions may
print. The parent (`process`) ends it at the deadline of a call; this module measures no deadlines.

The main thread runs the functions because libraries that use signals need it. A second thread reads the pipe, so that
it detects the parent's end during a call as well.
"""

import asyncio
import faulthandler
import inspect
import math
import os
import socket
import sys
import threading
import time
import traceback
from numbers import Real
from queue import SimpleQueue
from typing import Any

import msgspec

from penstock.errors import TransientRewardError
from penstock.runtime.lifeline import die_with_parent
from penstock_reward.functions.registry import RewardFunction, first_line, load
from penstock_reward.processes.messages import (
    LENGTH,
    Accepted,
    Call,
    CallBatch,
    FailureKind,
    Message,
    Outcome,
    Refused,
    Start,
    Started,
    ToChild,
    frame,
    frame_length,
)

MAX_REASON_CHARS = 300
PASSING = (TransientRewardError, OSError)  # connection errors and TimeoutError are OSErrors
NOT_PASSING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def main() -> None:
    """`child.py SOCKET_FD PARENT_PID`: serve batches until the pipe ends."""
    number, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent_pid)
    faulthandler.enable()
    os.set_inheritable(number, False)
    pipe = socket.socket(fileno=number)
    requests: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read_frames, args=(pipe, requests), daemon=True).start()
    with asyncio.Runner() as runner:
        CallLoop(pipe, runner).serve(requests)


def _read_frames(pipe: socket.socket, requests: "SimpleQueue[bytes]") -> None:
    """Queue the messages; end the process with the pipe, even during a call."""
    try:
        with pipe.makefile("rb") as stream:
            while header := stream.read(LENGTH.size):
                requests.put(stream.read(frame_length(header)))
    except (OSError, ValueError) as error:
        print(f"reward worker: {describe(error)}", file=sys.stderr, flush=True)
    os._exit(0)


class CallLoop:
    """Loads the functions that are asked for, and serves the calls of them in order."""

    def __init__(self, pipe: socket.socket, runner: asyncio.Runner) -> None:
        self._pipe = pipe
        self._runner = runner
        self._functions: dict[str, RewardFunction] = {}
        self._unavailable: dict[str, str] = {}

    def serve(self, requests: "SimpleQueue[bytes]") -> None:
        while True:
            message = msgspec.msgpack.decode(requests.get(), type=ToChild)
            if isinstance(message, Start):
                self._send(self._start(message))
                continue
            for call in message.calls:
                self._load(call.function)
            self._send(Accepted())
            for call in message.calls:
                self._send(self._outcome(message, call))

    def _send(self, message: Message) -> None:
        self._pipe.sendall(frame(message))

    def _start(self, message: Start) -> Started | Refused:
        if message.modules_path:
            sys.path.insert(0, message.modules_path)
        for name in message.functions:
            self._load(name)
            if name in self._unavailable:
                return Refused(name, self._unavailable[name])
        return Started({name: first_line(function) for name, function in self._functions.items()})

    def _load(self, name: str) -> None:
        if name in self._functions or name in self._unavailable:
            return
        try:
            self._functions[name] = load(name)
        except BaseException as error:
            # An exception of the user's module at import, sys.exit() included, is a reason and never ends this process.
            self._unavailable[name] = describe(error)

    def _outcome(self, batch: CallBatch, call: Call) -> Outcome:
        function = self._functions.get(call.function)
        if function is None:
            return _failure("unavailable", f"cannot be loaded: {self._unavailable[call.function]}", 0.0)
        metadata = msgspec.msgpack.decode(batch.metadata)
        started = time.perf_counter()
        try:
            value = function(
                prompt=batch.prompt,
                completion=batch.completions[call.completion],
                answer=batch.answer,
                metadata=metadata,
            )
            if inspect.isawaitable(value):
                value = self._runner.run(_awaited(value))
            return judged(value, time.perf_counter() - started)
        except BaseException as error:
            # Likewise: a function that raises, SystemExit and KeyboardInterrupt included, is a failed call.
            return _failure(kind_of(error), describe(error), time.perf_counter() - started)


def kind_of(error: BaseException) -> FailureKind:
    """Whether the cause may pass: the function declares that, or the network or the host raised the exception."""
    if isinstance(error, NOT_PASSING):
        return "exception"
    return "transient" if isinstance(error, PASSING) else "exception"


async def _awaited(value: Any) -> Any:
    return await value


def judged(value: Any, seconds: float) -> Outcome:
    """The outcome of a call that returned: its value if that is a finite number (bool and NumPy scalars are)."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):
        return _failure("not_a_number", f"returned {type(value).__name__}; expected a number", seconds)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        return _failure("not_a_number", f"returned {number}; expected a finite number", seconds)
    return Outcome(number, seconds)


def _failure(kind: FailureKind, reason: str, seconds: float) -> Outcome:
    return Outcome(None, seconds, kind, reason)


def describe(error: BaseException) -> str:
    """Type, message and place of an exception, as text that can be packed."""
    try:
        message = str(error)
    except Exception as nested:
        message = f"<its message raises {type(nested).__name__}>"
    frames = traceback.extract_tb(error.__traceback__)
    place = ""
    if frames and frames[-1].filename != __file__:
        place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if len(text) > MAX_REASON_CHARS:
        text = text[:MAX_REASON_CHARS] + "..."
    return (text + place).encode("utf-8", "replace").decode()


if __name__ == "__main__":
    main()

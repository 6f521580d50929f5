"""The worker process: runs reward functions, one call after another, in its main thread.

Owns the calls. Invariant: every exception and every result of a function becomes an Outcome. The parent (`process`)
ends it at the deadline of a call; this module measures no deadlines.
"""

import asyncio
import inspect
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec

from penstock.errors import TransientRewardError
from penstock.workers.child import ServicePipe, open_pipe
from penstock.workers.results import describe, finite_number
from penstock_reward.functions.registry import RewardFunction, first_line, load
from penstock_reward.processes.messages import (
    Accepted,
    Call,
    CallBatch,
    FailureKind,
    Outcome,
    Refused,
    Start,
    Started,
    ToChild,
)

PASSING = (TransientRewardError, OSError)  # connection errors and TimeoutError are OSErrors
MOST_CAUSES = 8
NOT_PASSING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def main() -> None:
    """`child.py SOCKET_FD PARENT_PID`: serve batches until the pipe ends."""
    pipe = open_pipe()
    with asyncio.Runner() as runner:
        CallLoop(pipe, runner).serve()


class CallLoop:
    """Loads the functions that are asked for, and serves the calls of them in order."""

    def __init__(self, pipe: ServicePipe, runner: asyncio.Runner) -> None:
        self._pipe = pipe
        self._runner = runner
        self._functions: dict[str, RewardFunction] = {}
        self._unavailable: dict[str, str] = {}
        self._folder = ""

    def serve(self) -> None:
        while True:
            message = msgspec.msgpack.decode(self._pipe.receive(), type=ToChild)
            if isinstance(message, Start):
                self._pipe.send(self._start(message))
                continue
            for call in message.calls:
                self._load(call.function)
            self._pipe.send(Accepted())
            for call in message.calls:
                self._pipe.send(self._outcome(message, call))

    def _start(self, message: Start) -> Started | Refused:
        if message.modules_path:
            self._folder = message.modules_path
            sys.path.insert(0, self._folder)
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
            self._unavailable[name] = describe(error, __file__, self._folder)

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
            return _failure(kind_of(error), describe(error, __file__, self._folder), time.perf_counter() - started)


def kind_of(error: BaseException) -> FailureKind:
    """Whether the cause may pass: the function declares that, or the network or the host raised the exception.

    A library may raise one of its own for it (httpx, openai): what it handled then counts.
    """
    chain = list(islice(_causes(error), MOST_CAUSES))
    if any(isinstance(each, NOT_PASSING) for each in chain):
        return "exception"
    return "transient" if any(isinstance(each, PASSING) for each in chain) else "exception"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__  # httpcore raises `from None` what the socket raised


async def _awaited(value: Any) -> Any:
    return await value


def judged(value: Any, seconds: float) -> Outcome:
    """The outcome of a call that returned: its value if that is a finite number (bool and NumPy scalars are)."""
    try:
        return Outcome(finite_number(value), seconds)
    except ValueError as error:
        return _failure("not_a_number", str(error), seconds)


def _failure(kind: FailureKind, reason: str, seconds: float) -> Outcome:
    return Outcome(None, seconds, kind, reason)


if __name__ == "__main__":
    main()

"""Looking at many things at once, some of which may fail or never answer.

Invariant: whatever a look does, it becomes lines, and all of them are there within the deadline. Looks run in daemon
threads: a file system or driver that hangs keeps the process from nothing.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from penstock_launch.doctor.report import Group, Line, not_looked_at

DEADLINE_SECONDS = 20.0

T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """One look. what: its subject, for the line that takes the place of its own if it fails or is late."""

    group: str
    what: str
    lines: Callable[[], Sequence[Line]]


def later(work: Callable[[], T]) -> "Future[T]":
    """The result of work that begins now, in a thread of its own; several looks may wait for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True, name="look").start()
    return future


def look_at_all(looks: Sequence[Look], deadline_seconds: float = DEADLINE_SECONDS) -> list[Group]:
    """The lines of all looks, in their order."""
    ends_at = time.monotonic() + deadline_seconds
    begun = [(look, later(look.lines)) for look in looks]
    found: dict[str, list[Line]] = {look.group: [] for look in looks}
    for look, future in begun:
        found[look.group] += _lines(look, future, max(0.0, ends_at - time.monotonic()), deadline_seconds)
    return [Group(title, lines) for title, lines in found.items()]


def _lines(
    look: Look, future: "Future[Sequence[Line]]", seconds_left: float, deadline_seconds: float
) -> Sequence[Line]:
    try:
        error = future.exception(seconds_left)
    except TimeoutError:
        return [not_looked_at(look.what, f"no answer within {deadline_seconds:g} s")]
    if error is None:
        return future.result()
    return [not_looked_at(look.what, f"{type(error).__name__}: {error}")]

"""The way from the trainer to one tracker: a bounded queue that one thread drains.

Owns the queue, the thread and the file with the position of the tracker. Invariant: `put` never waits; a tracker that
is slow or fails loses only its own values, which are counted, and writes one log line for each of the two reasons;
after `close` nothing of it keeps the process from ending.

    loop -- put --> [bounded queue] -- thread: open, log, log, ..., close --> library
                     full: dropped            raised: dropped
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
from prometheus_client import Counter

from penstock.durable import write_durably
from penstock.errors import DataError
from penstock.records.samples import SampleLine
from penstock_trainer.telemetry.records import Histogram
from penstock_trainer.telemetry.trackers import Point, TrackedRun, Tracker

MAX_WAITING = 1000  # hours of training for a tracker that hangs, and little memory
log = logging.getLogger(__name__)


class TrackerPosition(msgspec.Struct, frozen=True):
    """The progress of a tracker: the id of its last step, and its number of evaluations."""

    step: int = -1
    num_evals: int = 0


@dataclass(frozen=True)
class Entry:
    """What a tracker gets after so many steps, and its position once it has it.

    samples: reads them when they are logged, so that entries that wait hold none.
    """

    step: int
    values: Mapping[str, float]
    position: TrackerPosition
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    samples: Callable[[], Sequence[SampleLine]] = tuple


class Feed:
    """One tracker's queue and thread."""

    def __init__(
        self, tracker: Tracker, run: TrackedRun, backlog: Iterable[Entry], position_path: Path, dropped: Counter
    ) -> None:
        """`backlog`: what an earlier life did not track. `dropped`: a counter with labels tracker and reason."""
        self._tracker = tracker
        self._run = run
        self._position_path = position_path
        self._dropped = dropped
        self._backlog = deque(backlog)
        self._waiting: deque[Entry] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._reported: set[str] = set()
        self._thread = threading.Thread(target=self._drain, name=f"tracker-{tracker.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, entry: Entry) -> None:
        """Queue one entry, or drop it if too many wait. Never waits."""
        with self._changed:
            is_full = len(self._waiting) >= MAX_WAITING
            if not is_full:
                self._waiting.append(entry)
                self._changed.notify()
        if is_full:
            self._drop("slow", f"{MAX_WAITING} steps wait for it")

    def begin_close(self) -> None:
        """Let the thread end after it has taken all waiting entries."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def finish_close(self, deadline: float) -> None:
        """Wait for its end until `deadline` (of time.monotonic); then drop the rest and abandon the tracker."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._thread.is_alive():
            return
        with self._changed:
            left = len(self._backlog) + len(self._waiting)
            self._backlog.clear()
            self._waiting.clear()
        self._drop("slow", "it did not end within tracking.close_seconds", count=left)
        try:
            self._tracker.abandon()
        except Exception:  # a library's: the run has succeeded or failed without it
            log.warning("tracker %s cannot be abandoned", self._tracker.name, exc_info=True)

    def _drain(self) -> None:
        is_open = self._try("open", partial(self._tracker.open, self._run))
        while (entry := self._next()) is not None:
            if not is_open:
                self._drop("failed", "it could not be opened")
            elif not self._try("log", partial(self._log, entry)):
                self._drop("failed", "it raised")
        if is_open:
            self._try("close", self._tracker.close)

    def _log(self, entry: Entry) -> None:
        self._tracker.log(Point(entry.step, entry.values, entry.histograms, entry.samples()))
        write_durably(self._position_path, msgspec.json.encode(entry.position))

    def _next(self) -> Entry | None:
        """The oldest entry; None if there is none and none will come."""
        with self._changed:
            if self._backlog:
                return self._backlog.popleft()
            while not self._waiting and not self._closing:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting else None

    def _try(self, verb: str, act: Callable[[], None]) -> bool:
        """Call `act`; True if it succeeds. A library may raise anything, and training goes on in any case."""
        try:
            act()
        except Exception as error:
            self._report("failed", f"{verb}: {error!r}", error)
            return False
        return True

    def _drop(self, reason: str, what: str, count: int = 1) -> None:
        self._dropped.labels(tracker=self._tracker.name, reason=reason).inc(count)
        self._report(reason, what)

    def _report(self, reason: str, what: str, error: Exception | None = None) -> None:
        if reason in self._reported:
            return
        self._reported.add(reason)
        log.warning(
            "tracker %s: %s (%s); training goes on, and values that it does not take are dropped and counted",
            self._tracker.name,
            reason,
            what,
            exc_info=error,
        )


def read_position(path: Path) -> TrackerPosition:
    """The position that an earlier life left; that of a new tracker if there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=TrackerPosition)
    except FileNotFoundError:
        return TrackerPosition()
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} holds no position ({error}); delete it to track the full run again") from None

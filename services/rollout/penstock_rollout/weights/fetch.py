"""Fetches a version chunk by chunk into a folder of this host, from one parent after the other.

Owns the order in which parents are asked and left. Invariants: a chunk counts as here only after it was compared with
its digest and written; a parent that was left is not asked again, except the last one, the trainer; a fault of a parent
fails nothing as long as one is left.

    parent --gone, slow, wrong--> its parent --...--> the trainer, up to `LAST_ATTEMPTS` times --> WeightsError

A parent is slow if it sends less than a quarter of what it receives itself. If the next one sends no more than twice as
much, the link of this host is slow: then no parent is blamed for it, and none is left for it any more.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import SecretStr

from penstock.contracts.weight_sources import LeftParent, Parent
from penstock.durable import missing
from penstock.errors import WeightsError
from penstock.weights.chunks import ChunkList
from penstock.weights.relay import HeldVersion
from penstock_rollout.weights.parent_stream import Pace, ParentError, ParentStream

JUDGE_SECONDS = 1.0  # of reading, before a parent can be slow
SLOW_FACTOR = 4.0
BETTER_FACTOR = 2.0
LEAST_SECONDS = 0.1  # of a socket's patience
LAST_ATTEMPTS = 3
AGAIN_SECONDS = 0.5  # before the trainer is asked again

Begin = Callable[[ChunkList], HeldVersion]


class _TooLateError(Exception):
    """Not a TimeoutError, which a socket's silence is too."""


class Fetch:
    """One version on its way. `run` blocks: for a thread of its own."""

    def __init__(
        self,
        digest: str,
        parents: tuple[Parent, ...],
        token: SecretStr | None,
        *,
        begin: Begin,
        received: Callable[[int, bool], None],
        seconds: float,
    ) -> None:
        """`begin`: makes the place of the version, once its list is known. `received`: gets the bytes of each chunk,
        and whether the last parent sent them. `seconds`: after which it has failed."""
        self.left: list[LeftParent] = []
        self.sender = ""
        """The parent that sent last."""
        self._stop = threading.Event()
        self._digest = digest
        self._parents = parents
        self._token = token
        self._begin = begin
        self._received = received
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds
        self._begun = time.monotonic()
        self.num_bytes = 0
        self._slow_rate = 0.0
        self._own_link_is_slow = False
        self.held: HeldVersion | None = None
        self._chunks: ChunkList | None = None
        self._stream: ParentStream | None = None

    def end(self) -> None:
        """Let `run` fail soon. From another thread."""
        self._stop.set()
        if self._stream is not None:
            self._stream.end()

    def run(self) -> HeldVersion:
        """The complete version. WeightsError: no parent sent it, or there is no room. TimeoutError: too late."""
        try:
            return self._run()
        except _TooLateError:
            raise TimeoutError(
                f"the version was not received within weights.push_timeout_seconds = {self._seconds:g}: "
                f"{self.num_bytes} bytes of it had come"
            ) from None

    def _run(self) -> HeldVersion:
        for parent in self._attempts():
            self.sender = parent.name
            is_last = parent is self._parents[-1]
            seconds = max(self._deadline - time.monotonic(), LEAST_SECONDS)
            self._stream = stream = ParentStream(parent, self._token, self._judge, is_last=is_last, seconds=seconds)
            try:
                self._take(stream, is_last=is_last)
            except ParentError as error:
                self.left.append(LeftParent(parent.name, error.reason, str(error)))
            else:
                self._withdraw_slow(stream.pace)
                assert self.held is not None
                return self.held
        seen = "; ".join(f"{each.name}: {each.reason}, {each.detail}" for each in self.left)
        raise WeightsError(f"no parent sent the version ({seen}): expected one that does, at least the trainer")

    def _attempts(self) -> Iterator[Parent]:
        yield from self._parents
        for _ in range(LAST_ATTEMPTS - 1):
            self._stop.wait(AGAIN_SECONDS)
            self._check_time()
            yield self._parents[-1]

    def _take(self, stream: ParentStream, *, is_last: bool) -> None:
        start = self.held.num_held if self.held else 0
        with contextlib.closing(stream.read(self._digest, self._chunks, start)) as arriving:
            for chunks, number, data in arriving:
                if self.held is None:
                    self._chunks, self.held = chunks, self._begin(chunks)
                self._write(self.held, number, data)
                self.num_bytes += len(data)
                self._received(len(data), is_last)
                elapsed = time.monotonic() - self._begun
                self.held.arrived(number + 1, self.num_bytes / elapsed if elapsed else 0.0)

    def _write(self, held: HeldVersion, number: int, data: memoryview) -> None:
        try:
            held.write(number, data)
        except OSError as error:
            raise no_room(held.folder, error) from error

    def _judge(self, pace: Pace, parent_rate: float) -> None:
        self._check_time()
        if self._own_link_is_slow or pace.seconds < JUDGE_SECONDS or pace.rate * SLOW_FACTOR >= parent_rate:
            return
        if self._slow_rate and pace.rate < BETTER_FACTOR * self._slow_rate:
            self._withdraw_slow(pace)
            self._own_link_is_slow = True
            return
        self._slow_rate = pace.rate
        raise ParentError("slow", f"it sent {pace.rate:.0f} bytes a second, and received {parent_rate:.0f} itself")

    def _withdraw_slow(self, pace: Pace) -> None:
        """Blame no parent for being slow if another one was no faster."""
        if pace.seconds and pace.rate < BETTER_FACTOR * self._slow_rate:
            self.left = [each for each in self.left if each.reason != "slow"]

    def _check_time(self) -> None:
        if self._stop.is_set() or time.monotonic() > self._deadline:
            raise _TooLateError


def no_room(folder: Path, error: OSError) -> WeightsError:
    """The error for a version that cannot be written."""
    room = "room for two copies of the weights; set weights.local_folder to a larger one"
    return WeightsError(f"a version cannot be written to {folder} ({error.strerror}): {missing(error, room)}")

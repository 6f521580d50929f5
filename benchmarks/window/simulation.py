"""One simulated run in ticket order: which ticket of the window starts first, and a bound that may move.

Owns a discrete-event model of trainer, pushes and servers over the real TicketBook. Time is in training steps of one
unit. Invariant: orders change when a ticket starts and nothing else: each batch is the B oldest tickets.

    issue -> window -> [order] -> slot of a server -> G completions -> arrive -> batch -> [1] -> push -> announce
"""

import heapq
import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from benchmarks.window.controller import Controller
from benchmarks.window.lengths import GROUP_SIZE, Lengths, drawn
from benchmarks.window.server import Servers
from penstock.tickets import TicketBook, TicketLimits

BATCH_SIZE = 32
PUSH = 0.05
MEASURED = (0.1, 0.95)  # the part of the steps that counts: not while the queue fills, nor while it runs dry

Order = Literal["number", "longest", "longest of batch", "least slack"]
ORDERS: tuple[Order, ...] = ("number", "longest", "longest of batch", "least slack")
Sample = Callable[[float, random.Random], tuple[float, float]]
"""(lag of a batch, random numbers) -> its effective sample size and KL."""


@dataclass(frozen=True)
class Case:
    """ratio: time in which full servers generate a batch, over the time of a training step."""

    lengths: Lengths
    num_servers: int
    ratio: float
    order: Order = "number"
    seed: int = 0
    num_steps: int = 200


@dataclass
class Group:
    """The completions of one ticket that has started. started: the version that was announced then."""

    started: int
    left: int = GROUP_SIZE
    ends: list[int] = field(default_factory=list)
    """Announced version at the end of each completion."""


@dataclass
class Result:
    """Sums over the measured steps. lags: of each step, the mean over its tokens; bounds: of each step."""

    steps: int = 0
    seconds: float = 0.0
    lags: list[float] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)
    batches: list[list[int]] = field(default_factory=list)
    """Of all steps, also those that are not measured."""

    @property
    def rate(self) -> float:
        """Steps per unit of time."""
        return self.steps / self.seconds

    @property
    def lag(self) -> float:
        return statistics.fmean(self.lags)

    def gap(self, ratio: float) -> float:
        """Gap to ideal."""
        return 1 / (self.rate * max(1.0, ratio)) - 1


class Book(TicketBook):
    """A book whose credits may change. Tickets that are outstanding stay so."""

    def allow(self, max_staleness: int) -> None:
        self._limits = replace(self._limits, max_outstanding=(max_staleness + 1) * self._limits.batch_size)


class Simulation:
    """One run under a fixed bound, or under a controller that sees what `sample` gives for the lag of each step."""

    def __init__(
        self, case: Case, bound: int | Controller, sample: Sample | None = None, *, idle: bool = False
    ) -> None:
        """idle: the trainer needs no time, and lengths are not scaled."""
        self._case, self._bound_or_controller, self._sample = case, bound, sample
        self._step_seconds, self._push_seconds = (0.0, 0.0) if idle else (1.0, PUSH)
        self._scale = 1.0 if idle else scale(case)
        self._rng = random.Random(case.seed)
        self._book = Book(TicketLimits(BATCH_SIZE, 0, num_draws=10**9, max_steps=case.num_steps))
        self._bounds: dict[int, int] = {}
        """Step -> the largest staleness that the credits allowed when its tickets were issued."""
        self._servers = Servers(case.num_servers)
        self._events: list[tuple[float, int, str, int, int]] = []
        self._tie = itertools.count()
        self._now = self._waits_since = 0.0
        self._window: list[tuple[tuple[float, ...], int]] = []
        self._groups: dict[int, Group] = {}
        self._num_announced = self._num_trained = 0
        self._training = self._pushing = False
        self.result = Result()

    def run(self) -> Result:
        self._issue()
        while self._events:
            at, _, kind, subject, stamp = heapq.heappop(self._events)
            if kind == "decoded" and self._servers[subject].stamp != stamp:
                continue
            self.result.seconds += (at - self._now) * self._is_measured
            self._now = at
            match kind:
                case "decoded":
                    self._decoded(subject)
                case "trained":
                    self._training = False
                    self._num_trained += 1
                    self._waits_since = at
                case "pushed":
                    self._pushing = False
                    self._num_announced += 1
                    self._book.announce(self._num_announced)
                    self._issue()
            self._begin_push()
            self._begin_step()
        return self.result

    @property
    def _is_measured(self) -> bool:
        return MEASURED[0] <= self._book.num_steps / self._case.num_steps < MEASURED[1]

    @property
    def _bound(self) -> int:
        bound = self._bound_or_controller
        return bound.bound if isinstance(bound, Controller) else bound

    def _after(self, delay: float, kind: str) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._tie), kind, 0, 0))

    def _foresee(self, index: int) -> None:
        """The next completion of a server to end."""
        server = self._servers[index]
        if server.next_end is not None:
            heapq.heappush(self._events, (server.next_end, next(self._tie), "decoded", index, server.stamp))

    def _issue(self) -> None:
        self._book.allow(self._bound)
        for number in self._book.issue():
            step = number // BATCH_SIZE
            self._bounds[step] = max(self._bounds.get(step, 0), self._bound)
            _, expected = drawn(self._base_lengths, number, self._case.seed)
            heapq.heappush(self._window, (self._key(number, self._scale * expected), number))
        self._start()

    @property
    def _base_lengths(self) -> Lengths:
        return replace(self._case.lengths, growth=1.0)

    def _key(self, number: int, expected: float) -> tuple[float, ...]:
        """The smallest starts first. Least slack: batches are due one after the other, each as fast as they can be."""
        batch = number // BATCH_SIZE
        match self._case.order:
            case "number":
                return (number,)
            case "longest":
                return (-expected, number)
            case "longest of batch":
                return (batch, -expected, number)
            case "least slack":
                return (batch * max(1.0, self._case.ratio) - expected, number)

    def _start(self) -> None:
        while self._window and (index := self._servers.take()) is not None:
            _, number = heapq.heappop(self._window)
            lengths, _ = drawn(self._base_lengths, number, self._case.seed)
            progress = number / (self._case.num_steps * BATCH_SIZE)
            scale = self._scale * self._case.lengths.growth ** (progress - 0.5)
            server = self._servers[index]
            server.advance(self._now)
            server.add(number, (scale * length for length in lengths))
            self._groups[number] = Group(self._num_announced)
            self._foresee(index)

    def _decoded(self, index: int) -> None:
        server = self._servers[index]
        server.advance(self._now)
        number = server.pop()
        group = self._groups[number]
        group.ends.append(self._num_announced)
        group.left -= 1
        if not group.left:
            self._servers.leave(index)
            self._book.arrive(number, has_gradient=True)
            self._start()
        self._foresee(index)

    def _begin_push(self) -> None:
        if not self._pushing and self._num_announced < self._num_trained:
            self._pushing = True
            self._after(self._push_seconds, "pushed")

    def _begin_step(self) -> None:
        """At most one step ahead of the push, as the trainer's loop."""
        if self._training or self._num_trained > self._num_announced + 1:
            return
        batch = self._book.next_batch()
        if batch is not None:
            self._count(list(batch))
            self._book.commit(list(batch))
            self._training = True
            self._after(self._step_seconds, "trained")

    def _count(self, batch: list[int]) -> None:
        result, step = self.result, self._num_trained
        groups = [self._groups.pop(number) for number in batch]
        bound = self._bounds.pop(step)
        oldest = max(step - group.started for group in groups)
        assert oldest <= bound, f"step {step} trains tokens {oldest} versions old, and its bound is {bound}"
        lag = statistics.fmean(step - (group.started + end) / 2 for group in groups for end in group.ends)
        waited = self._now - self._waits_since
        if self._sample is not None and isinstance(self._bound_or_controller, Controller):
            self._bound_or_controller.step(waited / (waited + 1.0), *self._sample(lag, self._rng))
        result.batches.append(batch)
        if self._is_measured:
            result.steps += 1
            result.lags.append(lag)
            result.bounds.append(bound)


@cache
def _seconds_of_batch(lengths: Lengths, num_servers: int, seed: int) -> float:
    """Time in which full servers generate a batch, if a mean length takes one unit."""
    result = Simulation(Case(lengths, num_servers, 1.0, seed=seed, num_steps=100), 40, idle=True).run()
    return result.seconds / result.steps


def scale(case: Case) -> float:
    """Time of a mean length such that full servers generate a batch in `ratio` units."""
    lengths = replace(case.lengths, growth=1.0)
    return case.ratio / _seconds_of_batch(lengths, case.num_servers, case.seed)

"""Simulates both orders of `staleness` over the real TicketBook, and prints what each costs.

Owns a discrete-event model of the loop: servers with a fixed number of places, a trainer whose step takes one unit of
time, and pushes that every server takes at once. All rules on tickets are those of `penstock.tickets`. It is seeded and
takes less than a minute; a case with a thousand servers about as long:

    python -m benchmarks.staleness_sim
    python -m benchmarks.staleness_sim --servers 1000 --places 32 --lengths lognormal --max-staleness 4

A group is G completions that start together; a completion's length is its time. A token is by the version that is
announced when it is generated, so a long completion begins with old weights and ends with new ones. Places and trainer
are matched: with all places busy, B groups are generated in one step's time. No ticket fails.

    issue -> queue -> place on a server -> [max of G lengths] -> arrive -> batch -> [1] -> push -> announce -> issue
"""

import argparse
import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from penstock.contracts.vocabulary import DropReason
from penstock.tickets import TicketBook, TicketLimits

Order = Literal["ticket", "drop", "mask"]
ORDERS: tuple[Order, ...] = ("ticket", "drop", "mask")
STALENESS = (0, 1, 2, 4)
SHOWN_STALENESS = 6  # columns of the histogram; the last counts this and above
BATCH_SIZE, GROUP_SIZE, NUM_STEPS = 16, 8, 1000
BUSY_STEPS = 2.0  # mean time of a group, in steps
LONGEST = 10.0  # mean lengths, before the cut: what sampling.max_new_tokens is for
MEASURED = (0.1, 0.95)  # the part of the steps that counts: not while the queue fills, nor while it runs dry
PUSH = 0.05

Lengths = Callable[[random.Random], float]
LENGTHS: dict[str, Lengths] = {
    "constant": lambda _: 1.0,
    "exponential": lambda rng: min(LONGEST, rng.expovariate(1.0)),
    "lognormal": lambda rng: min(LONGEST, rng.lognormvariate(-0.72, 1.2)),
    "pareto": lambda rng: min(LONGEST, rng.paretovariate(1.5) / 3),
}


@dataclass
class Group:
    """The completions of one ticket. started: when its request began; lengths: in time."""

    started: float
    lengths: tuple[float, ...]

    @property
    def duration(self) -> float:
        return max(self.lengths)


@dataclass
class Result:
    """Sums over the measured part of a run; a completion's staleness is that of its oldest trained token."""

    batch_size: int = BATCH_SIZE
    steps: int = 0
    seconds: float = 0.0
    busy: float = 0.0
    dropped: int = 0
    trained: int = 0
    staleness: Counter[int] = field(default_factory=Counter)
    trained_tokens: float = 0.0
    masked_tokens: float = 0.0
    trained_lengths: float = 0.0
    num_trained_lengths: int = 0
    generated_tokens: float = 0.0
    num_generated: int = 0

    @property
    def bias(self) -> float:
        """Mean trained length (without masked tokens), divided by the mean generated length."""
        if not (self.num_trained_lengths and self.num_generated):
            return 1.0
        return self.trained_lengths / self.num_trained_lengths * self.num_generated / self.generated_tokens

    @property
    def token_rate(self) -> float:
        """Trained tokens per unit of time, divided by those of one full batch per unit of time."""
        full = self.batch_size * GROUP_SIZE * self.generated_tokens / self.num_generated
        return self.trained_tokens / self.seconds / full


class Simulation:
    """One run."""

    def __init__(
        self,
        lengths: Lengths,
        order: Order,
        max_staleness: int,
        seed: int,
        num_steps: int,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self._rng = random.Random(seed)
        self._lengths, self._order, self._max_staleness = lengths, order, max_staleness
        self._scale = BUSY_STEPS / mean_duration(lengths)
        self._num_places = round(batch_size * BUSY_STEPS)
        self._num_steps = num_steps
        self._book = TicketBook(
            TicketLimits(
                batch_size,
                (max_staleness + 1) * batch_size,
                num_draws=10**9,
                max_steps=num_steps,
                order="ticket" if order == "ticket" else "ready",
            )
        )
        self._events: list[tuple[float, int, str, int]] = []
        self._tie = itertools.count()
        self._now = 0.0
        self._queue: deque[int] = deque()
        self._running: dict[int, Group] = {}
        self._held: dict[int, Group] = {}
        self._announced_at = [0.0]  # by version
        self._training: list[int] = []
        self._num_pushed = self._num_trained = 0
        self._pushing = False
        self.result = Result(batch_size)

    def run(self) -> Result:
        self._refill()
        while self._events:
            at, _, kind, subject = heapq.heappop(self._events)
            if self._measured:
                self.result.seconds += at - self._now
                self.result.busy += (at - self._now) * len(self._running)
            self._now = at
            match kind:
                case "generated":
                    self._arrive(subject)
                case "trained":
                    self._end_step()
                case "pushed":
                    self._announce()
            self._begin_push()
            self._begin_step()
            self._fill_places()
        return self.result

    @property
    def _measured(self) -> bool:
        return MEASURED[0] <= self._book.num_steps / self._num_steps < MEASURED[1]

    def _at(self, delay: float, kind: str, subject: int = 0) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._tie), kind, subject))

    def _refill(self) -> None:
        self._queue.extend(self._book.issue())
        self._fill_places()

    def _fill_places(self) -> None:
        while self._queue and len(self._running) < self._num_places:
            number = self._queue.popleft()
            lengths = tuple(self._scale * self._lengths(self._rng) for _ in range(GROUP_SIZE))
            self._running[number] = Group(self._now, lengths)
            self._at(self._running[number].duration, "generated", number)

    def _arrive(self, number: int) -> None:
        group = self._held[number] = self._running.pop(number)
        self._book.arrive(number, has_gradient=True)
        if self._measured:
            self.result.generated_tokens += sum(group.lengths)
            self.result.num_generated += GROUP_SIZE

    def _begin_step(self) -> None:
        """Check for stale groups as the consumer does, then begin a step, at most one step ahead of the push."""
        if self._training or self._num_trained > self._num_pushed + 1:
            return
        while (batch := self._book.next_batch()) is not None:
            stale = [number for number in batch if self._staleness(self._held[number].started) > self._max_staleness]
            if not stale or self._order == "mask":
                self._book.commit(batch)
                self._training = batch
                self._count(batch)
                self._at(1.0, "trained")
                return
            if self._order == "ticket":
                raise AssertionError(f"tickets {stale} are stale in ticket order: its rules exclude that")
            for number in stale:
                self._book.drop(number, DropReason.STALE)
                del self._held[number]
                self.result.dropped += self._measured
            self._refill()

    def _end_step(self) -> None:
        for number in self._training:
            del self._held[number]
        self._training = []
        self._num_trained += 1

    def _begin_push(self) -> None:
        if not self._pushing and self._num_pushed < self._num_trained:
            self._pushing = True
            self._at(PUSH, "pushed", self._num_trained)

    def _announce(self) -> None:
        self._pushing = False
        self._num_pushed += 1
        self._announced_at.append(self._now)
        self._book.announce(self._num_pushed)
        self._refill()

    def _version(self, at: float) -> int:
        """The version that was announced at a time."""
        version = len(self._announced_at) - 1
        while self._announced_at[version] > at:
            version -= 1
        return version

    def _staleness(self, at: float) -> int:
        """Staleness of a token generated at a time, in the next step."""
        return self._num_trained - self._version(at)

    def _count(self, batch: Sequence[int]) -> None:
        if not self._measured:
            return
        result, oldest = self.result, self._num_trained - self._max_staleness
        young_from = self._announced_at[oldest] if oldest > 0 else 0.0
        result.steps += 1
        result.trained += len(batch)
        for number in batch:
            group = self._held[number]
            for length in group.lengths:
                masked = min(length, max(0.0, young_from - group.started))
                result.masked_tokens += masked
                result.trained_tokens += length - masked
                if length > masked:
                    result.trained_lengths += length - masked
                    result.num_trained_lengths += 1
                    result.staleness[min(self._staleness(max(group.started, young_from)), SHOWN_STALENESS)] += 1


def mean_duration(lengths: Lengths, num_draws: int = 20_000) -> float:
    """Mean of the longest of G lengths, over the same draws in every run."""
    rng = random.Random(0)
    return math.fsum(max(lengths(rng) for _ in range(GROUP_SIZE)) for _ in range(num_draws)) / num_draws


def row(name: str, order: Order, max_staleness: int, result: Result) -> str:
    """One line of the table."""
    places = result.batch_size * BUSY_STEPS
    total = max(1, sum(result.staleness.values()))
    histogram = " ".join(f"{100 * result.staleness[age] / total:.0f}" for age in range(max_staleness + 1))
    over = sum(count for age, count in result.staleness.items() if age > max_staleness)
    assert not over, f"{over} completions were trained with older tokens than {max_staleness}"
    cells = (
        name,
        str(max_staleness),
        {"ticket": "ticket", "drop": "ready, drop", "mask": "ready, mask"}[order],
        f"{result.steps / result.seconds:.2f}",
        f"{result.token_rate:.2f}",
        f"{1 - result.busy / (places * result.seconds):.2f}",
        f"{result.dropped / (result.dropped + result.trained):.3f}",
        f"{result.masked_tokens / (result.masked_tokens + result.trained_tokens):.3f}",
        histogram,
        f"{result.bias:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def table(
    seed: int, num_steps: int, lengths: Collection[str], bounds: Collection[int], batch_size: int
) -> Iterator[str]:
    """The rows of all cases. With max_staleness 0 both orders are the same, so one row."""
    yield from (
        "| Lengths | max_staleness | Order | Steps | Tokens | Idle places | Dropped | Masked tokens "
        "| Staleness 0, 1, .. in % | Length bias |",
        "| --- " * 10 + "|",
    )
    for name in lengths:
        for max_staleness in bounds:
            for order in ORDERS if max_staleness else ORDERS[:1]:
                result = Simulation(LENGTHS[name], order, max_staleness, seed, num_steps, batch_size).run()
                yield row(name, order, max_staleness, result)


def batch_for(num_servers: int, num_places: int) -> int:
    """Groups of a step, if servers with so many places each are matched to the trainer.

    ValueError: there are not enough places for a batch.
    """
    batch_size = int(num_servers * num_places / GROUP_SIZE / BUSY_STEPS)
    if not batch_size:
        least = GROUP_SIZE * BUSY_STEPS
        raise ValueError(
            f"--servers {num_servers} with --places {num_places}: expected {least:g} places or more in all"
        )
    return batch_size


def main() -> None:
    parser = argparse.ArgumentParser(description="Ticket order against ready order, simulated.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--places", type=int, default=256, help="completions that a server generates at once")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--max-staleness", type=int, nargs="+", default=STALENESS)
    arguments = parser.parse_args()
    batch_size = batch_for(arguments.servers, arguments.places)
    for line in table(arguments.seed, arguments.steps, arguments.lengths, arguments.max_staleness, batch_size):
        print(line, flush=True)


if __name__ == "__main__":
    main()

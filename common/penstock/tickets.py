"""Tickets: flow control, staleness, order and recovery as one pure state machine (docs/architecture.md).

Owns which ticket numbers are issued, when a batch is complete, and when a ticket is resolved. No I/O: the trainer's
loop reports arrivals to it and carries out its answers.

Ticket number n fixes one draw. A ticket is outstanding from its issue until a version that includes its step is
announced, or until it is dropped. With at most (max_staleness + 1) * B outstanding, every ticket issued while version v
is announced belongs to a step <= v + max_staleness, and no server older than v takes it; so no token is ever staler
than max_staleness.

    issue -> WAITING -> arrive -> ARRIVED -> next_batch, commit -> COMMITTED -> announce -> (gone: trained)
                ^          |          |
                '- reissue-'----------'         drop -> (gone: dropped)

Order `ticket`: a batch is the shortest arrived prefix. Order `ready`: a batch is the B oldest tickets that have
arrived, even if older ones are missing. The credits are the same, so three bounds remain: never more than
(max_staleness + 1) * B outstanding; never more than max_staleness + 1 steps ahead of the announced version; and a group
that has arrived is part of one of the next max_staleness + 1 batches. Nothing bounds the time until a group arrives:
if it is too old when its batch closes, the caller drops it or masks its tokens. With max_staleness 0 both
orders are the same.
"""

import math
from bisect import bisect_left, insort
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from heapq import heappop, heappush
from typing import Literal

from penstock.contracts.vocabulary import DropReason
from penstock.errors import StallError

BATCHES_WITHOUT_GRADIENT = 10  # this many batches of groups without a gradient end the run, if none has one meanwhile
BATCHES_OF_FAILURES = 4  # more than half of this many batches without a usable reward end the run
BATCHES_OF_EPISODES = 20  # over which the share of failed episodes is taken


class TicketState(Enum):
    """The state of an outstanding ticket."""

    WAITING = "waiting"
    ARRIVED = "arrived"
    COMMITTED = "committed"


@dataclass(frozen=True)
class TicketLimits:
    """max_outstanding: credits; num_draws: tickets in all; max_steps: 0 for no limit; order: of batches.

    max_failure_share: of episodes, in the tickets of the last 20 batches; 1: no limit, as for completions. delay: in
    order `ticket`, issue n only if it is certain which steps end below n - delay: the prompt of n depends on them.
    """

    batch_size: int
    max_outstanding: int
    num_draws: int
    max_steps: int = 0
    order: Literal["ticket", "ready"] = "ticket"
    max_failure_share: float = 1.0
    delay: int | None = None


class Failures:
    """The shares of the last tickets that failed, each 0 to 1; what is missing in the window counts as 0.

    >>> failures = Failures(num_tickets=4, max_share=0.5)
    >>> [failures.add(share) for share in (1.0, 0.5, 0.25, 0.5)], failures.share
    ([False, False, False, True], 0.5625)
    """

    def __init__(self, num_tickets: int, max_share: float) -> None:
        self._shares: deque[float] = deque(maxlen=num_tickets)
        self._sum = Fraction()  # exact: what is added and taken away again leaves nothing behind
        self._num_tickets = num_tickets
        self._max_share = max_share

    def add(self, share: float) -> bool:
        """Count a ticket; whether there are now more failures than the largest share."""
        forgotten = self._shares[0] if len(self._shares) == self._num_tickets else 0.0
        self._shares.append(share)
        if share != forgotten:
            self._sum += Fraction(share) - Fraction(forgotten)
        return self.share > self._max_share

    @property
    def share(self) -> float:
        return float(self._sum) / self._num_tickets


class NoGradient:
    """Tickets in a row that gave no gradient. Their end: `num_tickets` right ones in a row, or as many that are not.

    lowest: the lowest reward of the right ones, once there are enough in a row: no further ticket without a gradient
    changes it then; else None. highest: of the same ones, the reward of the ticket with the highest.

    >>> row = NoGradient(num_tickets=2)
    >>> [row.add(right) for right in (None, 1.0, 1.5)], row.lowest, row.highest
    ([False, False, False], 1.0, 1.5)
    >>> row.end()
    >>> [row.add(right) for right in (None, 1.0, None)], row.lowest
    ([False, False, True], None)
    """

    def __init__(self, num_tickets: int) -> None:
        self.num_tickets = num_tickets
        self.end()

    def end(self) -> None:
        """A ticket has given a gradient."""
        self._num = self._num_right = self._right_in_a_row = 0
        self._lowest, self.highest = math.inf, -math.inf

    def add(self, right: float | None) -> bool:
        """Count a ticket; whether too many were not right."""
        if self.lowest is not None:
            return False
        self._num += 1
        if right is None:
            self._right_in_a_row, self._lowest, self.highest = 0, math.inf, -math.inf
        else:
            self._num_right += 1
            self._right_in_a_row += 1
            self._lowest, self.highest = min(right, self._lowest), max(right, self.highest)
        return self._num - self._num_right == self.num_tickets

    @property
    def lowest(self) -> float | None:
        return self._lowest if self._right_in_a_row == self.num_tickets else None

    @property
    def error(self) -> StallError:
        """That there are too many."""
        right = f" ({self._num_right} of them were right: eval.success)" if self._num_right else ""
        return StallError(
            f"{self._num} tickets in a row gave no gradient: in each group all rewards were equal{right}; expected "
            "some to differ: the task is solved, too hard, or reward.functions give all answers the same reward"
        )


class TicketBook:
    """All outstanding tickets of a run, in order of number.

    One step in order `ticket`, from credits to credits:

        >>> book = TicketBook(TicketLimits(batch_size=2, max_outstanding=4, num_draws=8))
        >>> book.issue()
        [0, 1, 2, 3]
        >>> book.arrive(1, has_gradient=True)
        >>> book.next_batch(), book.oldest_waiting  # 0 comes first
        (None, 0)
        >>> book.arrive(0, has_gradient=True)
        >>> batch = book.next_batch()
        >>> batch, book.commit(batch)  # the numbers of the tickets, and of the step
        ([0, 1], 0)
        >>> book.issue()  # they keep their credits until weights that include the step are announced
        []
        >>> book.announce(num_steps=1)
        [0, 1]
        >>> book.issue()
        [4, 5]
    """

    def __init__(self, limits: TicketLimits) -> None:
        self._limits = limits
        self._outstanding: dict[int, TicketState] = {}
        self._num: Counter[TicketState] = Counter()
        self._waiting: list[int] = []
        """A heap of the waiting tickets, and of at most as many that do not wait any more: the first one waits."""
        self._arrived: list[int] = []
        """In order."""
        self._committed: dict[int, list[int]] = {}
        """Step -> its tickets."""
        self.next_number = 0
        self.num_steps = 0
        self.without_gradient = NoGradient(BATCHES_WITHOUT_GRADIENT * limits.batch_size)
        self._has_ended = False
        self._failed_tickets = Failures(BATCHES_OF_FAILURES * limits.batch_size, max_share=0.5)
        self._failed_episodes = Failures(BATCHES_OF_EPISODES * limits.batch_size, limits.max_failure_share)

    def restore(
        self, next_number: int, outstanding: Iterable[int], num_steps: int, committed: Mapping[int, int] | None = None
    ) -> None:
        """Start from the ledger: all outstanding tickets wait, no matter which worker holds them.

        `committed`: ticket -> step, for tickets whose step is trained and not announced; they keep their credits.
        """
        self.next_number = next_number
        self.num_steps = num_steps
        self._committed = {}
        for number, step in (committed or {}).items():
            self._committed.setdefault(step, []).append(number)
        states = dict.fromkeys(outstanding, TicketState.WAITING)
        states |= dict.fromkeys(committed or {}, TicketState.COMMITTED)
        self._outstanding = dict(sorted(states.items()))
        self._num = Counter(states.values())
        self._waiting = [number for number, state in self._outstanding.items() if state is TicketState.WAITING]
        self._arrived = []

    @property
    def outstanding(self) -> dict[int, TicketState]:
        """Ticket -> state, in order of number."""
        return dict(self._outstanding)

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def oldest_waiting(self) -> int | None:
        """The ticket that the next batch waits for first."""
        return self._waiting[0] if self._waiting else None

    @property
    def blocked_by(self) -> int | None:
        """The single ticket that blocks the next batch: all its other groups have arrived. None if more are missing."""
        oldest = self.oldest_waiting
        if oldest is None or self.next_batch() is not None:
            return None
        is_last = self._draws_ended and self._num[TicketState.WAITING] == 1
        enough = len(self._arrived) + 1 >= self._limits.batch_size
        return oldest if enough or is_last else None

    @property
    def finished(self) -> bool:
        """Nothing is left to train."""
        return self._draws_ended and not self._num_pending

    @property
    def _draws_ended(self) -> bool:
        return self.next_number >= self._limits.num_draws or self._needed == 0

    @property
    def _needed(self) -> int:
        """Further tickets that the remaining steps can use."""
        if not self._limits.max_steps:
            return self._limits.num_draws
        return max(0, (self._limits.max_steps - self.num_steps) * self._limits.batch_size - self._num_pending)

    @property
    def _num_pending(self) -> int:
        """Outstanding tickets that no step has trained."""
        return len(self._outstanding) - self._num[TicketState.COMMITTED]

    @property
    def _num_certain(self) -> int:
        """Further tickets of which it is certain which steps end `delay` below them.

        The next step ends with the B-th of its tickets that is not dropped. While fewer than B of those that may still
        be trained are below n - delay, no further step ends there, whatever becomes of them.
        """
        if self._limits.delay is None:
            return self._limits.num_draws
        size = self._limits.batch_size
        open_ones = [n for n, state in self._outstanding.items() if state is not TicketState.COMMITTED][:size]
        last = open_ones[-1] if len(open_ones) == size else self.next_number + size - len(open_ones) - 1
        return max(0, last + self._limits.delay + 1 - self.next_number)

    def issue(self) -> list[int]:
        """The numbers to issue now; they count as outstanding from here on."""
        if self._has_ended:
            return []
        count = min(
            self._limits.max_outstanding - len(self._outstanding),
            self._limits.num_draws - self.next_number,
            self._needed,
            self._num_certain,
        )
        numbers = list(range(self.next_number, self.next_number + max(0, count)))
        for number in numbers:
            self._set(number, TicketState.WAITING)
        self.next_number += len(numbers)
        return numbers

    def end(self) -> None:
        """The run ends before its draws do: no further ticket is issued, and no group that arrives is a stall."""
        self._has_ended = True

    def accepts(self, number: int) -> bool:
        """False for a duplicate: a ticket that is held, trained or dropped already."""
        return self._outstanding.get(number) is TicketState.WAITING

    def arrive(self, number: int, *, has_gradient: bool, failed_share: float = 0.0, right: float | None = None) -> None:
        """A usable group has arrived; `failed_share` of its episodes failed. right: its lowest reward if all are right.

        StallError if too many episodes fail, or no group has had a gradient for too long. If the last ones were right,
        there is no error, and `without_gradient.lowest` is a number.
        """
        self._expect(number, TicketState.WAITING)
        self._set(number, TicketState.ARRIVED)
        self._count_failures(False, failed_share)
        self._count_gradient(has_gradient, right)

    def drop(self, number: int, reason: DropReason, failed_share: float = 0.0, right: float | None = None) -> None:
        """The ticket ends without training: a waiting one, or an arrived one whose group is too stale for its batch.

        StallError if most rewards fail, too many episodes do (`failed_share` of this one's), or no group has had a
        gradient for too long, as of `arrive`, which has `right`, too.
        """
        self._expect(number, TicketState.ARRIVED if reason is DropReason.STALE else TicketState.WAITING)
        self._set(number, None)
        if reason is DropReason.STALE:  # it counted when it arrived
            return
        self._count_failures(reason is DropReason.REWARD_FAILED, failed_share)
        if reason is DropReason.DEGENERATE:
            self._count_gradient(False, right)

    def wait_again(self, number: int) -> None:
        """An arrived group cannot be trained after all: the ticket is issued again."""
        self._expect(number, TicketState.ARRIVED)
        self._set(number, TicketState.WAITING)

    def lose_gradient(self, number: int) -> None:
        """An arrived group has lost its gradient. StallError if no group has had one for too long."""
        self._expect(number, TicketState.ARRIVED)
        self._count_gradient(False)

    def next_batch(self) -> list[int] | None:
        """The groups of the next step in order of number, or None; fewer than B once no more can arrive."""
        size, arrived = self._limits.batch_size, self._arrived
        if len(arrived) >= size:
            is_prefix = not self._waiting or arrived[size - 1] < self._waiting[0]
            return arrived[:size] if is_prefix or self._limits.order == "ready" else None
        return arrived[:] if arrived and self._draws_ended and not self._waiting else None

    def commit(self, batch: list[int]) -> int:
        """Make the batch the next step's; returns the step's number. Its tickets stay outstanding until announced."""
        step = self.num_steps
        for number in batch:
            self._expect(number, TicketState.ARRIVED)
            self._set(number, TicketState.COMMITTED)
        self._committed[step] = list(batch)
        self.num_steps += 1
        return step

    def announce(self, num_steps: int) -> list[int]:
        """Weights that include the first `num_steps` steps are announced; returns the tickets that this resolves."""
        steps = [step for step in self._committed if step < num_steps]
        resolved = [number for step in steps for number in self._committed.pop(step)]
        for number in resolved:
            self._set(number, None)
        return resolved

    def _set(self, number: int, state: TicketState | None) -> None:
        """Change the state of a ticket; None: it has ended. In time that hardly grows with the outstanding tickets."""
        before = self._outstanding.get(number)
        if before is not None:
            self._num[before] -= 1
        if before is TicketState.ARRIVED:
            del self._arrived[bisect_left(self._arrived, number)]
        if state is None:
            del self._outstanding[number]
        else:
            self._outstanding[number] = state
            self._num[state] += 1
        if state is TicketState.ARRIVED:
            insort(self._arrived, number)
        elif state is TicketState.WAITING:
            heappush(self._waiting, number)
        while self._waiting and self._outstanding.get(self._waiting[0]) is not TicketState.WAITING:
            heappop(self._waiting)
        if len(self._waiting) > 2 * self._num[TicketState.WAITING]:
            states = self._outstanding
            self._waiting = sorted(n for n in {*self._waiting} if states.get(n) is TicketState.WAITING)

    def _expect(self, number: int, state: TicketState) -> None:
        if self._outstanding.get(number) is not state:
            raise ValueError(f"ticket {number} is {self._outstanding.get(number)}: expected {state}")

    def _count_failures(self, ticket_failed: bool, failed_share: float) -> None:
        too_many_tickets = self._failed_tickets.add(float(ticket_failed))
        too_many_episodes = self._failed_episodes.add(failed_share)
        if self._has_ended:
            return
        if too_many_tickets:
            number = BATCHES_OF_FAILURES * self._limits.batch_size
            raise StallError(
                f"the reward failed for {self._failed_tickets.share * number:.0f} of the last {number} tickets; "
                "expected it to work for at least half of them: see the reward service's log and the key "
                "reward.functions, or, for the score of an environment, the agent service's log"
            )
        if too_many_episodes:
            raise StallError(
                f"{self._failed_episodes.share:.0%} of the episodes of the last {BATCHES_OF_EPISODES} steps failed: "
                f"expected at most {self._limits.max_failure_share:.0%} (agent.max_failure_share); see the agent "
                "service's log"
            )

    def _count_gradient(self, has_gradient: bool, right: float | None = None) -> None:
        if has_gradient:
            self.without_gradient.end()
        elif self.without_gradient.add(right) and not self._has_ended:
            raise self.without_gradient.error

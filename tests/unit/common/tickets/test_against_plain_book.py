"""A book gives the answers of a plain one, whatever happens to its tickets."""

from typing import Literal

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.contracts import DropReason
from penstock.tickets import Failures, TicketBook, TicketLimits, TicketState
from tests.unit.common.tickets.plain_book import PlainBook


class Books(RuleBasedStateMachine):
    """The same calls to both books. Rewards never fail and always give a gradient, so that no book stops the run."""

    @initialize(
        batch_size=st.integers(1, 4),
        staleness=st.integers(0, 3),
        num_draws=st.integers(0, 60),
        max_steps=st.integers(0, 6),
        order=st.sampled_from(["ticket", "ready"]),
    )
    def begin(
        self, batch_size: int, staleness: int, num_draws: int, max_steps: int, order: Literal["ticket", "ready"]
    ) -> None:
        limits = TicketLimits(batch_size, (staleness + 1) * batch_size, num_draws, max_steps, order)
        self.book, self.plain = TicketBook(limits), PlainBook(limits)
        self.issue()

    def in_state(self, state: TicketState) -> bool:
        return state in self.plain.states.values()

    def choose(self, data: st.DataObject, state: TicketState) -> int:
        return data.draw(st.sampled_from(self.plain.of(state)))

    @rule()
    def issue(self) -> None:
        assert self.book.issue() == self.plain.issue()

    @precondition(lambda self: self.in_state(TicketState.WAITING))
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        number = self.choose(data, TicketState.WAITING)
        self.book.arrive(number, has_gradient=True)
        self.plain.states[number] = TicketState.ARRIVED

    @precondition(lambda self: self.in_state(TicketState.WAITING))
    @rule(data=st.data())
    def poison(self, data: st.DataObject) -> None:
        number = self.choose(data, TicketState.WAITING)
        self.book.drop(number, DropReason.POISON)
        del self.plain.states[number]

    @precondition(lambda self: self.in_state(TicketState.ARRIVED))
    @rule(data=st.data())
    def drop_as_stale(self, data: st.DataObject) -> None:
        number = self.choose(data, TicketState.ARRIVED)
        self.book.drop(number, DropReason.STALE)
        del self.plain.states[number]

    @precondition(lambda self: self.in_state(TicketState.ARRIVED))
    @rule(data=st.data())
    def wait_again(self, data: st.DataObject) -> None:
        number = self.choose(data, TicketState.ARRIVED)
        self.book.wait_again(number)
        self.plain.states[number] = TicketState.WAITING

    @precondition(lambda self: self.plain.next_batch() is not None)
    @rule()
    def commit(self) -> None:
        batch = self.plain.next_batch()
        assert batch is not None
        assert self.book.commit(batch) == self.plain.commit(batch)

    @rule(data=st.data())
    def announce(self, data: st.DataObject) -> None:
        num_steps = data.draw(st.integers(0, self.plain.num_steps))
        assert self.book.announce(num_steps) == self.plain.announce(num_steps)

    @rule()
    def start_again(self) -> None:
        """A new life of the trainer: what had arrived waits again."""
        self.book = TicketBook(self.plain.limits)
        open_tickets = [n for n, state in self.plain.states.items() if state is not TicketState.COMMITTED]
        self.book.restore(self.plain.next_number, open_tickets, self.plain.num_steps, self.plain.step_of)
        self.plain.states |= dict.fromkeys(open_tickets, TicketState.WAITING)

    @invariant()
    def answers_are_equal(self) -> None:
        book, plain = self.book, self.plain
        assert list(book.outstanding.items()) == list(plain.outstanding().items())
        assert book.num_outstanding == len(plain.states)
        assert book.oldest_waiting == plain.oldest_waiting()
        assert book.next_batch() == plain.next_batch()
        assert book.blocked_by == plain.blocked_by()
        assert (book.finished, book.next_number, book.num_steps) == (
            plain.finished(),
            plain.next_number,
            plain.num_steps,
        )
        waiting = plain.of(TicketState.WAITING)
        assert [n for n in range(plain.next_number + 2) if book.accepts(n)] == waiting


TestBooks = Books.TestCase


@given(st.integers(1, 5), st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1 / 3, 1.0]), max_size=30))
def test_the_share_of_failures_has_no_roundoff_of_what_is_forgotten(num_tickets: int, shares: list[float]) -> None:
    failures, plain = Failures(num_tickets, 0.5), PlainBook(TicketLimits(1, 1, 1))
    for share in shares:
        plain.shares.append(share)
        assert failures.add(share) == (plain.failed_share(num_tickets) > 0.5)
        assert failures.share == plain.failed_share(num_tickets)

"""Tickets in ready order: batches, expiry, stragglers, and the bounds under any order of events."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.contracts.vocabulary import DropReason
from penstock.errors import StallError
from penstock.tickets import TicketState
from tests.unit.common.tickets.ticket_books import make_book, make_ready_book


def test_in_ready_order_a_batch_is_the_oldest_that_have_arrived() -> None:
    book = make_ready_book()
    book.issue()
    for number in (3, 2, 1):
        assert book.next_batch() is None or number == 1
        book.arrive(number, has_gradient=True)
    assert book.next_batch() == [1, 2]
    assert book.commit([1, 2]) == 0
    assert list(book.outstanding) == [0, 1, 2, 3]
    assert book.announce(1) == [1, 2]
    assert book.issue() == [4, 5]


def test_in_ready_order_the_last_batch_waits_for_every_ticket() -> None:
    book = make_ready_book(num_draws=3)
    book.issue()
    for number in (1, 2):
        book.arrive(number, has_gradient=True)
    book.commit([1, 2])
    assert book.next_batch() is None
    assert not book.finished
    book.arrive(0, has_gradient=True)
    assert book.next_batch() == [0]
    book.commit([0])
    assert book.finished


def test_only_a_stale_group_ends_its_ticket_after_its_arrival() -> None:
    book = make_ready_book()
    book.issue()
    book.arrive(0, has_gradient=True)
    for reason in (DropReason.DEGENERATE, DropReason.POISON, DropReason.REWARD_FAILED):
        with pytest.raises(ValueError, match="ticket 0 is"):
            book.drop(0, reason)
    book.drop(0, DropReason.STALE)
    assert 0 not in book.outstanding


def test_an_expired_ticket_gives_its_credit_back_and_never_comes_again() -> None:
    book = make_ready_book()
    book.issue()
    book.arrive(0, has_gradient=True)
    book.drop(0, DropReason.STALE)
    assert not book.accepts(0)
    assert book.issue() == [4]
    with pytest.raises(ValueError, match=r"ticket 1 is TicketState\.WAITING: expected TicketState\.ARRIVED"):
        book.drop(1, DropReason.STALE)


def test_a_lost_gradient_counts_as_none() -> None:
    book = make_ready_book(batch_size=10, max_staleness=9)
    numbers = book.issue()
    for number in numbers[:-1]:
        book.arrive(number, has_gradient=False)
    book.arrive(numbers[-1], has_gradient=True)
    for number in numbers[:-1]:
        book.lose_gradient(number)
    with pytest.raises(StallError, match="100 tickets in a row gave no gradient"):
        book.lose_gradient(numbers[-1])


@pytest.mark.parametrize("order", ["ticket", "ready"])
def test_a_straggler_blocks_once_all_others_of_a_batch_are_here(order: str) -> None:
    book = make_book(batch_size=3) if order == "ticket" else make_ready_book(batch_size=3)
    book.issue()
    assert book.blocked_by is None
    book.arrive(1, has_gradient=True)
    assert book.blocked_by is None
    book.arrive(2, has_gradient=True)
    assert book.blocked_by == 0
    book.arrive(4, has_gradient=True)
    assert book.blocked_by == (0 if order == "ticket" else None)
    book.arrive(0, has_gradient=True)
    assert book.blocked_by is None


def test_the_only_ticket_of_a_short_last_batch_blocks_it() -> None:
    book = make_ready_book(batch_size=4, num_draws=2)
    book.issue()
    assert book.blocked_by is None
    book.arrive(1, has_gradient=True)
    assert book.blocked_by == 0


@given(
    data=st.data(),
    batch_size=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    num_draws=st.integers(1, 40),
    max_steps=st.sampled_from([0, 0, 3]),
)
@settings(deadline=None)  # a busy machine is no failure
def test_in_ready_order_every_ticket_ends_once_and_what_has_arrived_waits_a_bounded_time(
    data: st.DataObject, batch_size: int, max_staleness: int, num_draws: int, max_steps: int
) -> None:
    """Any interleaving of arrivals, drops, expiries, commits, late announcements and tickets issued again."""
    book = make_ready_book(batch_size, max_staleness, num_draws, max_steps)
    book.issue()
    announced, trained, dropped = 0, list[int](), set[int]()
    arrived_at: dict[int, int] = {}
    issued_again = 0
    while not book.finished:
        waiting = [number for number, state in book.outstanding.items() if state is TicketState.WAITING]
        batch = book.next_batch()
        moves = ["arrive"] * (2 * bool(waiting)) + ["commit"] * (batch is not None)
        moves += ["announce"] * (announced < book.num_steps)
        moves += ["drop"] * bool(waiting and len(dropped) < 5) + ["expire"] * bool(batch and len(dropped) < 5)
        moves += ["again"] * bool(batch and issued_again < 5)
        match data.draw(st.sampled_from(moves)):
            case "arrive":
                number = data.draw(st.sampled_from(waiting))
                assert book.accepts(number)
                book.arrive(number, has_gradient=True)
                arrived_at[number] = book.num_steps
            case "drop":
                number = data.draw(st.sampled_from(waiting))
                book.drop(number, DropReason.POISON)
                dropped.add(number)
            case "expire":
                number = data.draw(st.sampled_from(batch or []))
                book.drop(number, DropReason.STALE)
                dropped.add(number)
            case "again":
                number = data.draw(st.sampled_from(batch or []))
                book.wait_again(number)
                issued_again += 1
            case "commit":
                assert batch is not None
                assert len(batch) == batch_size or book.next_number == num_draws or max_steps
                step = book.commit(batch)
                assert all(step - arrived_at[number] <= max_staleness for number in batch)
                trained += batch
            case "announce":
                announced = data.draw(st.integers(announced + 1, book.num_steps))
                book.announce(announced)
        assert len(book.outstanding) <= (max_staleness + 1) * batch_size
        assert book.num_steps - announced <= max_staleness + 1
        assert len(trained) == len(set(trained))
        book.issue()
    assert set(trained) | dropped == set(range(book.next_number))
    assert not set(trained) & dropped
    assert book.next_number == num_draws or len(trained) == max_steps * batch_size


@given(data=st.data(), batch_size=st.integers(1, 4), num_draws=st.integers(1, 20))
@settings(deadline=None)  # a busy machine is no failure
def test_without_staleness_both_orders_are_the_same(data: st.DataObject, batch_size: int, num_draws: int) -> None:
    books = make_book(batch_size, 0, num_draws), make_ready_book(batch_size, 0, num_draws)
    while not books[0].finished:
        for book in books:
            book.issue()
        assert books[0].outstanding == books[1].outstanding
        waiting = [number for number, state in books[0].outstanding.items() if state is TicketState.WAITING]
        number = data.draw(st.sampled_from(waiting))
        for book in books:
            book.arrive(number, has_gradient=True)
        batch = books[0].next_batch()
        assert batch == books[1].next_batch()
        if batch is not None:
            for book in books:
                book.announce(book.commit(batch) + 1)
    assert books[1].finished

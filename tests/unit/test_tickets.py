"""The ticket state machine: credits, prefixes, ends, and the staleness bound under any order of events."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import StallError
from penstock.tickets import TicketBook, TicketLimits, TicketState


def make_book(batch_size: int = 2, max_staleness: int = 1, num_draws: int = 100, max_steps: int = 0) -> TicketBook:
    return TicketBook(TicketLimits(batch_size, (max_staleness + 1) * batch_size, num_draws, max_steps))


def test_never_more_outstanding_than_credits() -> None:
    book = make_book()
    assert book.issue() == [0, 1, 2, 3]
    assert book.issue() == []


def test_a_batch_is_the_arrived_prefix_in_order() -> None:
    book = make_book()
    book.issue()
    book.arrive(1, has_gradient=True)
    book.arrive(2, has_gradient=True)
    assert book.next_batch() is None
    book.arrive(0, has_gradient=True)
    assert book.next_batch() == [0, 1]


def test_credits_come_back_only_when_a_version_is_announced() -> None:
    book = make_book()
    book.issue()
    for number in (0, 1):
        book.arrive(number, has_gradient=True)
    assert book.commit([0, 1]) == 0
    assert book.issue() == []
    assert book.announce(0) == []
    assert book.announce(1) == [0, 1]
    assert book.issue() == [4, 5]


def test_after_a_restart_what_is_trained_and_not_announced_keeps_its_credits() -> None:
    book = make_book()
    book.restore(4, [2, 3], 1, committed={0: 0, 1: 0})
    assert book.issue() == []
    book.drop(3)
    assert book.issue() == [4]
    assert book.announce(1) == [0, 1]
    assert book.issue() == [5, 6]


def test_a_drop_gives_its_credit_back_at_once_and_the_batch_takes_the_next_ticket() -> None:
    book = make_book()
    book.issue()
    book.drop(0)
    assert book.issue() == [4]
    book.arrive(1, has_gradient=True)
    book.arrive(2, has_gradient=True)
    assert book.next_batch() == [1, 2]


def test_the_last_batch_is_short() -> None:
    book = make_book(num_draws=3)
    assert book.issue() == [0, 1, 2]
    for number in (0, 1, 2):
        book.arrive(number, has_gradient=True)
    book.commit([0, 1])
    assert book.next_batch() == [2]
    book.commit([2])
    assert book.finished


def test_max_steps_ends_the_draws_without_waste() -> None:
    book = make_book(max_steps=3)
    issued = 0
    for step in range(3):
        issued += len(book.issue())
        for number, state in book.outstanding.items():
            if state is TicketState.WAITING:
                book.arrive(number, has_gradient=True)
        batch = book.next_batch()
        assert batch is not None
        book.commit(batch)
        book.announce(step + 1)
    assert book.finished
    assert issued == 6
    assert book.outstanding == {}


def test_a_duplicate_is_not_accepted() -> None:
    book = make_book()
    book.issue()
    assert book.accepts(0)
    book.arrive(0, has_gradient=True)
    assert not book.accepts(0)
    book.drop(1)
    assert not book.accepts(1)
    assert not book.accepts(99)


def test_no_gradient_for_ten_batches_stops_the_run() -> None:
    book = make_book(batch_size=1, max_staleness=0)
    for _ in range(9):
        (number,) = book.issue()
        book.arrive(number, has_gradient=False)
        book.announce(book.commit([number]) + 1)
    (number,) = book.issue()
    with pytest.raises(StallError, match="all rewards were equal"):
        book.arrive(number, has_gradient=False)


def test_most_rewards_failing_stops_the_run() -> None:
    book = make_book(batch_size=1, max_staleness=0)
    for _ in range(2):
        (number,) = book.issue()
        book.drop(number, reward_failed=True)
    (number,) = book.issue()
    with pytest.raises(StallError, match="the reward failed for 3 of the last 4"):
        book.drop(number, reward_failed=True)


@given(
    data=st.data(),
    batch_size=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    num_draws=st.integers(1, 40),
)
@settings(deadline=None)  # a busy machine is no failure
def test_staleness_never_exceeds_the_bound(
    data: st.DataObject, batch_size: int, max_staleness: int, num_draws: int
) -> None:
    """Any interleaving of arrivals, drops, commits and late announcements keeps every ticket within the bound."""
    book = make_book(batch_size, max_staleness, num_draws)
    issued_at = dict.fromkeys(book.issue(), 0)
    announced, trained = 0, list[int]()
    dropped = set[int]()
    while not book.finished:
        waiting = [number for number, state in book.outstanding.items() if state is TicketState.WAITING]
        moves = ["arrive", "drop"] * bool(waiting)
        moves += ["commit"] * (book.next_batch() is not None) + ["announce"] * (announced < book.num_steps)
        match data.draw(st.sampled_from(moves)):
            case "arrive":
                book.arrive(data.draw(st.sampled_from(waiting)), has_gradient=True)
            case "drop" if len(dropped) < 5:
                number = data.draw(st.sampled_from(waiting))
                book.drop(number)
                dropped.add(number)
            case "commit":
                batch = book.next_batch()
                assert batch is not None
                step = book.commit(batch)
                assert all(step - issued_at[number] <= max_staleness for number in batch)
                trained += batch
            case "announce":
                announced = data.draw(st.integers(announced + 1, book.num_steps))
                book.announce(announced)
        assert len(book.outstanding) <= (max_staleness + 1) * batch_size
        issued_at.update(dict.fromkeys(book.issue(), announced))
    assert trained == sorted(trained)
    assert set(trained) | dropped == set(range(num_draws))
    assert not set(trained) & dropped


def make_ready_book(
    batch_size: int = 2, max_staleness: int = 1, num_draws: int = 100, max_steps: int = 0
) -> TicketBook:
    credits = (max_staleness + 1) * batch_size
    return TicketBook(TicketLimits(batch_size, credits, num_draws, max_steps, order="ready"))


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


def test_an_expired_ticket_gives_its_credit_back_and_never_comes_again() -> None:
    book = make_ready_book()
    book.issue()
    book.arrive(0, has_gradient=True)
    book.expire(0)
    assert not book.accepts(0)
    assert book.issue() == [4]
    with pytest.raises(ValueError, match=r"ticket 1 is TicketState\.WAITING: expected TicketState\.ARRIVED"):
        book.expire(1)


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


def test_degenerate_drops_count_towards_the_end_without_a_gradient() -> None:
    book = make_book(batch_size=1, max_staleness=0)
    for _ in range(9):
        (number,) = book.issue()
        book.drop(number, degenerate=True)
    (number,) = book.issue()
    with pytest.raises(StallError, match="10 tickets in a row gave no gradient"):
        book.drop(number, degenerate=True)


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
                book.drop(number)
                dropped.add(number)
            case "expire":
                number = data.draw(st.sampled_from(batch or []))
                book.expire(number)
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

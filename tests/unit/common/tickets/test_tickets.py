"""The ticket state machine: credits, prefixes, ends, and the staleness bound under any order of events."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.contracts.vocabulary import DropReason
from penstock.errors import StallError
from penstock.tickets import TicketBook, TicketLimits, TicketState
from tests.unit.common.tickets.ticket_books import make_book


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
    book.drop(3, DropReason.POISON)
    assert book.issue() == [4]
    assert book.announce(1) == [0, 1]
    assert book.issue() == [5, 6]


def test_a_drop_gives_its_credit_back_at_once_and_the_batch_takes_the_next_ticket() -> None:
    book = make_book()
    book.issue()
    book.drop(0, DropReason.POISON)
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
    book.drop(1, DropReason.POISON)
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


def arrive_alone(book: TicketBook, right: float | None, *, has_gradient: bool = False) -> None:
    [number] = book.issue()
    book.arrive(number, has_gradient=has_gradient, right=right)
    book.announce(book.commit([number]) + 1)


def test_right_answers_for_ten_batches_are_no_stall_until_a_gradient_comes() -> None:
    book = make_book(batch_size=1, max_staleness=0, num_draws=40)
    arrive_alone(book, None)
    arrive_alone(book, None, has_gradient=True)
    for right in (1.0, None, 1.0, 1.5, *[1.25] * 7):
        arrive_alone(book, right)
    assert book.without_gradient.lowest is None, "nine tickets since one that was not right"
    [number] = book.issue()
    book.drop(number, DropReason.DEGENERATE, right=1.25)
    assert book.without_gradient.lowest == 1.0
    assert book.without_gradient.highest == 1.5
    arrive_alone(book, None)  # comes before anybody has looked: the run is solved all the same
    assert book.without_gradient.lowest == 1.0
    arrive_alone(book, None, has_gradient=True)
    assert book.without_gradient.lowest is None


def test_right_tickets_between_others_delay_a_stall_and_are_named_in_it() -> None:
    book = make_book(batch_size=1, max_staleness=0)
    for right in (*[1.0] * 9, *[None] * 9):
        arrive_alone(book, right)
    with pytest.raises(StallError, match=r"19 tickets in a row .* equal \(9 of them were right: eval.success\)"):
        arrive_alone(book, None)


def test_a_book_that_has_ended_issues_nothing_and_is_no_stall() -> None:
    book = make_book(batch_size=4, max_staleness=9)
    numbers = book.issue()
    book.end()
    book.drop(numbers[0], DropReason.POISON)
    assert book.issue() == []
    for number in numbers[1:20]:
        book.drop(number, DropReason.REWARD_FAILED)
    for number in numbers[20:]:
        book.drop(number, DropReason.DEGENERATE)


def test_most_rewards_failing_stops_the_run() -> None:
    book = make_book(batch_size=1, max_staleness=0)
    for _ in range(2):
        (number,) = book.issue()
        book.drop(number, DropReason.REWARD_FAILED)
    (number,) = book.issue()
    with pytest.raises(StallError, match="the reward failed for 3 of the last 4"):
        book.drop(number, DropReason.REWARD_FAILED)


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
                book.drop(number, DropReason.POISON)
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


def test_degenerate_drops_count_towards_the_end_without_a_gradient() -> None:
    book = make_book(batch_size=1, max_staleness=0)
    for _ in range(9):
        (number,) = book.issue()
        book.drop(number, DropReason.DEGENERATE)
    (number,) = book.issue()
    with pytest.raises(StallError, match="10 tickets in a row gave no gradient"):
        book.drop(number, DropReason.DEGENERATE)


def episodes_book(batch_size: int = 1, max_failure_share: float = 0.25) -> TicketBook:
    return TicketBook(TicketLimits(batch_size, batch_size, 1000, max_failure_share=max_failure_share))


def pass_through(book: TicketBook, failed_share: float) -> None:
    """One ticket that arrives and is trained."""
    [number] = book.issue()
    book.arrive(number, has_gradient=True, failed_share=failed_share)
    book.commit([number])
    book.announce(book.num_steps)


def test_too_many_failed_episodes_of_the_last_20_steps_end_the_run() -> None:
    book = episodes_book()
    for share in [0.5] * 10:  # of 20 steps, of which ten are still missing: exactly a quarter
        pass_through(book, share)
    with pytest.raises(StallError, match=r"28% of the episodes of the last 20 steps failed: .*25% .*max_failure_share"):
        pass_through(book, 0.5)


def test_failed_episodes_of_earlier_steps_are_forgotten() -> None:
    book = episodes_book()
    for share in [0.5] * 10 + [0.0] * 10 + [0.5] * 10:
        pass_through(book, share)


def test_failed_episodes_of_dropped_tickets_count() -> None:
    book = episodes_book(batch_size=2)
    for _ in range(13):  # of 40 tickets
        book.drop(book.issue()[0], DropReason.DEGENERATE, failed_share=0.75)
    with pytest.raises(StallError, match=r"agent.max_failure_share"):
        book.drop(book.issue()[0], DropReason.DEGENERATE, failed_share=0.75)


def test_a_ticket_that_depends_on_steps_waits_until_they_are_certain() -> None:
    """Batches of 2, a delay of one step: ticket n needs to know which steps end at or below n - 2."""
    book = TicketBook(TicketLimits(batch_size=2, max_outstanding=4, num_draws=40, delay=2))
    assert book.issue() == [0, 1, 2, 3], "without drops the credits are the limit"
    book.drop(1, DropReason.DEGENERATE)
    assert book.issue() == [4], "0 and 2 may be a step, which ends at 3: 4 does not depend on it, 5 would"
    book.drop(3, DropReason.DEGENERATE)
    assert book.issue() == []
    book.arrive(0, has_gradient=True)
    assert book.issue() == []
    book.drop(2, DropReason.DEGENERATE)
    assert book.issue() == [5, 6], "0 and 4 are the next step, if 4 is not dropped"
    book.arrive(4, has_gradient=True)
    batch = book.next_batch()
    assert batch == [0, 4]
    book.commit(batch)
    assert book.issue() == [], "no credit is left before their announcement"
    assert book.announce(1) == [0, 4]
    assert book.issue() == [7, 8]

"""The order in which prompts are drawn: shares, passes, and the same answer however it is asked."""

from collections import Counter
from fractions import Fraction
from itertools import accumulate
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.errors import ConfigError
from penstock.seeds import permutation
from penstock_trainer.data.drawing.draw_order import DrawnSet, DrawOrder, draws_of_an_epoch, evenly_mixed, sets_of
from penstock_trainer.data.drawing.large_permutation import CHUNK, large_permutation
from penstock_trainer.data.prompt_table import set_sizes
from penstock_trainer.data.prompts import EncodedPrompt


def drawn(order: DrawOrder, epochs: range) -> list[tuple[int, int]]:
    """(set, row within it) of the draws of some epochs."""
    numbers = range(epochs.start * order.length, epochs.stop * order.length)
    pairs = [(order.set_of(number), order.row(number)) for number in numbers]
    return [(chosen, row - order.rows_of(chosen).start) for chosen, row in pairs]


def test_one_set_is_drawn_as_it_always_was() -> None:
    order = DrawOrder(7, [DrawnSet("", 11)])
    for epoch in range(3):
        rows = [order.row(number) for number in range(epoch * 11, (epoch + 1) * 11)]
        assert rows == permutation(7, epoch, 11)
    assert order.described == ""


def test_sets_without_weights_are_visited_once_in_each_epoch_and_mixed() -> None:
    order = DrawOrder(7, [DrawnSet("a", 20), DrawnSet("b", 30)])
    orders = [[order.row(number) for number in range(50 * epoch, 50 * (epoch + 1))] for epoch in range(2)]
    assert [sorted(each) for each in orders] == [list(range(50))] * 2
    assert orders[0] != orders[1]
    chosen = [order.set_of(number) for number in range(50)]
    assert chosen not in (sorted(chosen), sorted(chosen, reverse=True)), "not one set after the other"


@pytest.mark.parametrize("weights", [(1.0, 1.0, 2.0), (0.1, 0.6, 0.3), (5.0, 0.2, 0.2)])
def test_each_epoch_has_the_shares_of_the_weights(weights: tuple[float, float, float]) -> None:
    sizes = (4, 30, 7)
    order = DrawOrder(1, [DrawnSet(str(n), size, weights[n]) for n, size in enumerate(sizes)])
    for epoch in range(4):
        counts = Counter(chosen for chosen, _ in drawn(order, range(epoch, epoch + 1)))
        assert counts.total() == 41
        for number, weight in enumerate(weights):
            assert abs(counts[number] - 41 * weight / sum(weights)) < 1, "the nearest whole numbers of draws"


def test_a_set_visits_all_its_prompts_before_any_of_them_again() -> None:
    """As many draws as whole passes come to: each prompt was drawn as often as there were passes, in any epoch."""
    order = DrawOrder(3, [DrawnSet("small", 5, 3.0), DrawnSet("large", 40, 1.0)])
    counts = draws_of_an_epoch(order.sets)
    for epochs in (1, 4, 9):
        found = Counter(drawn(order, range(epochs)))
        for chosen, each in enumerate(order.sets):
            passes, begun = divmod(epochs * counts[chosen], each.size)
            times = [found[chosen, row] for row in range(each.size)]
            assert sorted(times) == sorted([passes + 1] * begun + [passes] * (each.size - begun))


def test_a_draw_is_the_same_in_whatever_order_it_is_asked() -> None:
    def make() -> DrawOrder:
        return DrawOrder(5, [DrawnSet("a", 6, 1.0), DrawnSet("b", 9, 0.7)])

    order, again = make(), make()
    expected = [(order.set_of(number), order.row(number)) for number in range(90)]
    numbers = list(range(90))
    Random(1).shuffle(numbers)
    assert {n: (again.set_of(n), again.row(n)) for n in numbers} == dict(enumerate(expected))
    other = DrawOrder(6, make().sets)
    assert [(other.set_of(n), other.row(n)) for n in range(90)] != expected


def test_sets_have_orders_of_their_own() -> None:
    """Two sets of one size and one share: their rows do not come in step."""
    order = DrawOrder(5, [DrawnSet("a", 12, 1.0), DrawnSet("b", 12, 1.0)])
    pairs = drawn(order, range(1))
    first, second = ([row for chosen, row in pairs if chosen == number] for number in range(2))
    assert first != second


def test_without_shuffling_rows_come_in_their_order_in_every_epoch() -> None:
    one = DrawOrder(7, [DrawnSet("", 5)], shuffle=False)
    assert [one.row(number) for number in range(12)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert one.described == "in the order of the rows"
    two = DrawOrder(7, [DrawnSet("a", 3, 1.0), DrawnSet("b", 5, 3.0)], shuffle=False)
    pairs = drawn(two, range(3))
    for chosen, size in ((0, 3), (1, 5)):
        rows = [row for each, row in pairs if each == chosen]
        assert rows == [number % size for number in range(len(rows))], "passes go on over the end of an epoch"
    shares = Counter(chosen for chosen, _ in pairs[:4])
    assert shares == {0: 1, 1: 3}, "each part of an epoch has the shares, as well as whole numbers can"


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_an_even_mixture_is_never_far_from_the_shares(counts: list[int]) -> None:
    places, total = evenly_mixed(counts), sum(counts)
    assert sorted(places) == list(range(total))
    ends = list(accumulate(counts))
    for chosen, count in enumerate(counts):
        its = [number for number, place in enumerate(places) if ends[chosen] - count <= place < ends[chosen]]
        assert [places[number] for number in its] == list(range(ends[chosen] - count, ends[chosen]))
        for k, number in enumerate(its):  # of each other set at most one draw more or less than its share came before
            assert abs(number - total * (2 * k + 1) / (2 * count)) <= len(counts)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_an_even_mixture_is_ordered_by_its_points(counts: list[int]) -> None:
    """As earlier releases computed it: (2 k + 1) / (2 c), then the earlier set."""
    points = [Fraction(2 * k + 1, 2 * count) for count in counts for k in range(count)]
    assert list(evenly_mixed(counts)) == sorted(range(len(points)), key=points.__getitem__)


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 300))
@example(seed=2**64 - 1, epoch=5, length=CHUNK + 2)
@example(seed=7, epoch=0, length=2 * CHUNK + 1)
def test_the_order_of_many_prompts_is_that_of_few(seed: int, epoch: int, length: int) -> None:
    assert list(large_permutation(seed, epoch, length)) == permutation(seed, epoch, length)


def test_a_weight_that_gives_no_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.train_sets.rare.weight is 0.001, .*no draw of the 20 of an epoch"):
        DrawOrder(0, [DrawnSet("usual", 10, 1.0), DrawnSet("rare", 10, 0.001)])


def test_sets_are_read_from_their_prompts() -> None:
    prompts = [EncodedPrompt("p", (1,), "", "", {}, dataset=name) for name in ("a", "a", "b")]
    sets = sets_of(set_sizes(prompts), {"a": 1.0, "b": 2.5})
    assert sets == [DrawnSet("a", 2, 1.0), DrawnSet("b", 1, 2.5)]
    assert DrawOrder(0, sets).described == "sets: a 2 prompts of weight 1.0, b 1 prompts of weight 2.5"


def test_tickets_around_the_end_of_an_epoch_are_those_of_any_order() -> None:
    """Those of the next epoch are issued while the last ones of this epoch are trained or issued again."""
    sets = [DrawnSet("a", 5, 3.0), DrawnSet("b", 7, 1.0)]
    in_order = DrawOrder(3, sets)
    expected = {number: in_order.row(number) for number in range(60)}
    order = DrawOrder(3, sets)
    assert {
        number: order.row(number) for number in (12, 11, 13, 10, 25, 24, 23, 50, 1, 49, 26)
    }.items() <= expected.items()

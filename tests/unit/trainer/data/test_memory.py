"""What a run holds of each prompt: the bytes of its text, four of each token, and no more that grows."""

import gc
import tracemalloc
from collections.abc import Callable

import pytest

from penstock_trainer.data.drawing.draw_order import DrawnSet, DrawOrder
from penstock_trainer.data.prompts import EncodedPrompt, digest
from penstock_trainer.data.shared_prompts import shared_prompts
from penstock_trainer.data.token_ids import TokenIds

NUM_PROMPTS = 400


def held_bytes(make: Callable[[], object]) -> int:
    """Bytes that stay with what `make` returns."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = make()
        gc.collect()
        size, _ = tracemalloc.get_traced_memory()
        del kept
    finally:
        tracemalloc.stop()
    return size


def prompts(num_tokens: int) -> list[EncodedPrompt]:
    """Their ids are above those that Python keeps ready."""
    return [EncodedPrompt("p", range(1000, 1000 + num_tokens), "a", "", {}) for _ in range(NUM_PROMPTS)]


def test_a_token_costs_four_bytes() -> None:
    short, long = (held_bytes(lambda count=count: prompts(count)) for count in (100, 1100))  # type: ignore[misc]
    assert (long - short) / (1000 * NUM_PROMPTS) < 4.1


def test_the_order_of_an_epoch_costs_four_bytes_for_each_prompt() -> None:
    def made(size: int) -> DrawOrder:
        order = DrawOrder(0, [DrawnSet("", size)])
        order.row(0)
        return order

    small, large = (held_bytes(lambda size=size: made(size)) for size in (1000, 21_000))  # type: ignore[misc]
    assert (large - small) / 20_000 < 4.5


def test_what_is_trained_is_compared_in_the_memory_of_the_held_out_prompts() -> None:
    train = [EncodedPrompt(f"{n}", (n,), "", "", {}, asked=f"{n} " * 200) for n in range(NUM_PROMPTS)]
    tracemalloc.start()
    try:
        assert shared_prompts(train[3:5], train) == train[3:5]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < NUM_PROMPTS * 200, "less than the words of all of them"


def test_packed_ids_are_those_of_any_sequence_and_digests_stay() -> None:
    ids = TokenIds(range(5))
    assert ids == [0, 1, 2, 3, 4] == ids
    assert (5,) not in (ids, TokenIds(()))
    assert {ids: 1}[TokenIds((0, 1, 2, 3, 4))] == 1
    assert (max(ids), list(ids[1:3]), not TokenIds(())) == (4, [1, 2], True)
    # Digests of earlier releases, with which their runs began.
    assert digest([EncodedPrompt("p", (1, 70000), "a", "r", {"n": 1})]) == "d1f2df3ec535fc02"
    with pytest.raises(OverflowError):
        TokenIds([2**31])

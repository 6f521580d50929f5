"""Draws: the meaning of a ticket number."""

import msgspec
import pytest

from penstock.contracts import Sampling, unpack_int32
from penstock.errors import ConfigError
from penstock.seeds import permutation
from penstock_trainer.data.drawing.draws import Draws, eval_ticket, stop_token_ids
from tests.unit.trainer.numbered_prompts import PROMPTS, config

SAMPLING = Sampling(1.0, 4, (2,))


def test_each_epoch_visits_every_prompt_once_in_its_own_order() -> None:
    draws = Draws(PROMPTS, SAMPLING, config())
    assert draws.num_draws == 15
    tickets = [draws.ticket(n, attempt=0, policy_version=0) for n in range(15)]
    orders = [[ticket.prompt for ticket in tickets[start : start + 5]] for start in (0, 5, 10)]
    assert all(sorted(order) == [f"p{n}" for n in range(5)] for order in orders)
    assert orders[0] == [f"p{n}" for n in permutation(3, 0, 5)]
    assert orders[0] != orders[1]


def test_without_shuffling_each_epoch_visits_the_prompts_in_their_order() -> None:
    draws = Draws(PROMPTS, SAMPLING, config(data={"train": {"path": "d"}, "shuffle": False}))
    prompts = [draws.ticket(number, attempt=0, policy_version=0).prompt for number in range(15)]
    assert prompts == [f"p{n}" for n in range(5)] * 3


def test_a_ticket_can_be_made_again_at_any_time() -> None:
    draws, again = Draws(PROMPTS, SAMPLING, config()), Draws(PROMPTS, SAMPLING, config())
    first = [draws.ticket(n, attempt=0, policy_version=2) for n in (0, 7, 1, 14)]
    assert [again.ticket(n, attempt=0, policy_version=2) for n in (14, 1, 7, 0)] == first[::-1]
    retried = again.ticket(7, attempt=3, policy_version=9)
    assert msgspec.structs.replace(retried, attempt=0, policy_version=2) == first[1]
    assert len(set(first[0].seeds)) == 4
    assert first[0].seeds != first[1].seeds


def test_a_ticket_carries_its_prompt() -> None:
    ticket = Draws(PROMPTS[:1], SAMPLING, config()).ticket(0, attempt=0, policy_version=0)
    assert (ticket.purpose, ticket.prompt, ticket.answer, ticket.metadata) == ("train", "p0", "a0", {"n": 0})
    assert unpack_int32(ticket.prompt_ids) == [0, 1]
    held_out = eval_ticket(PROMPTS[0], 9, sampling=SAMPLING, policy_version=1, seed=3)
    assert (held_out.key, len(held_out.seeds)) == ("e9", 1)


class Letters:
    """One token per character."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(each) for each in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_stop_strings_are_single_tokens() -> None:
    assert stop_token_ids(Letters(), ["\n", "!"], (7, 0)) == (0, 7, 10, 33)
    with pytest.raises(ConfigError, match=r"sampling.stop holds 'ab', which is 2 tokens .*exactly one token"):
        stop_token_ids(Letters(), ["ab"], ())

"""Draws and evaluation: what a ticket number means, and when a round is complete."""

from typing import Any

import msgspec
import pytest

from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    ScoredGroup,
    Ticket,
    VersionSpan,
    pack_float32,
    pack_int32,
    unpack_int32,
)
from penstock.errors import ConfigError
from penstock_trainer.data.draws import Draws, eval_ticket, stop_token_ids
from penstock_trainer.data.prompts import EncodedPrompt
from penstock_trainer.data.seeds import permutation
from penstock_trainer.rollouts.evaluation import NUMBERS_PER_LEASE, Evaluation

SAMPLING = Sampling(1.0, 4, (2,))
PROMPTS = [EncodedPrompt(f"p{n}", (n, n + 1), f"a{n}", "", {"n": n}) for n in range(5)]


def config(**changes: Any) -> Config:
    base: dict[str, Any] = {
        "run": {"seed": 3},
        "actor": {"path": "m", "group_size": 4},
        "data": {"train": {"path": "d"}},
        "total_train_epochs": 3,
    }
    return Config.model_validate(base | changes)


def test_each_epoch_visits_every_prompt_once_in_its_own_order() -> None:
    draws = Draws(PROMPTS, SAMPLING, config())
    assert draws.num_draws == 15
    tickets = [draws.ticket(n, attempt=0, policy_version=0) for n in range(15)]
    orders = [[ticket.prompt for ticket in tickets[start : start + 5]] for start in (0, 5, 10)]
    assert all(sorted(order) == [f"p{n}" for n in range(5)] for order in orders)
    assert orders[0] == [f"p{n}" for n in permutation(3, 0, 5)]
    assert orders[0] != orders[1]


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
    """One token per character but for what `merged` says."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(each) for each in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_stop_strings_are_single_tokens() -> None:
    assert stop_token_ids(Letters(), ["\n", "!"], (7, 0)) == (0, 7, 10, 33)
    with pytest.raises(ConfigError, match=r"sampling.stop holds 'ab', which is 2 tokens .*exactly one token"):
        stop_token_ids(Letters(), ["ab"], ())


def answered(ticket: Ticket, value: float | None, version: int = 0) -> ScoredGroup:
    span = VersionSpan(PolicyIdentity(version, "0" * 16), 0, 1)
    completion = Completion(pack_int32([5]), b"\x01", pack_float32([-0.5]), (span,), "text", "stop")
    group = RolloutGroup(ticket, (completion,), "s", 0.0, 1.0)
    return ScoredGroup(group, (Score(value) if value is not None else Score(None, "timeout"),))


def make_evaluation(num_prompts: int = 4, **changes: Any) -> Evaluation:
    return Evaluation(PROMPTS[:num_prompts], (2,), 5, config(**changes))


def test_a_round_ends_with_its_last_result() -> None:
    evaluation = make_evaluation()
    tickets = evaluation.start(10, 3)
    assert [ticket.number for ticket in tickets] == [5 * NUMBERS_PER_LEASE + n for n in range(4)]
    assert {(ticket.policy_version, ticket.sampling.temperature) for ticket in tickets} == {(3, 0.0)}
    values = [1.0, 0.5, None, 1.0]
    for n, (ticket, value) in enumerate(zip(reversed(tickets), values, strict=True)):
        assert evaluation.take_results() == []
        evaluation.record(answered(ticket, value, version=3 + n))
    [result] = evaluation.take_results()
    assert evaluation.take_results() == []
    assert (result.steps, result.accuracy, result.num_prompts, result.num_failed) == (10, 0.5, 4, 1)
    assert result.reward_mean == pytest.approx(2.5 / 3)
    assert (result.oldest_version, result.newest_version) == (3, 6)
    assert [sample.prompt for sample in result.samples] == ["p0", "p1", "p2", "p3"]
    assert evaluation.num_waiting == 0


def test_results_that_nobody_waits_for_are_ignored() -> None:
    evaluation = make_evaluation(num_prompts=2)
    first, second = evaluation.start(0, 0)
    for ticket in (first, first, msgspec.structs.replace(first, number=1)):
        evaluation.record(answered(ticket, 1.0))
    assert evaluation.num_waiting == 1
    assert evaluation.take_results() == []
    evaluation.record(answered(second, 1.0))
    assert len(evaluation.take_results()) == 1


def test_a_round_ends_without_a_poisoned_ticket_and_counts_it_as_failed() -> None:
    evaluation = make_evaluation(num_prompts=2)
    first, second = evaluation.start(0, 0)
    evaluation.record(answered(first, 1.0))
    assert evaluation.take_results() == []
    evaluation.give_up(second.number)
    [result] = evaluation.take_results()
    assert (result.accuracy, result.num_prompts, result.num_failed) == (0.5, 2, 1)
    for number in (second.number, *(ticket.number for ticket in evaluation.start(1, 1))):
        evaluation.give_up(number)
    assert evaluation.take_results() == []  # a round without any result has none
    assert evaluation.num_waiting == 0


def test_when_an_evaluation_is_due() -> None:
    assert [steps for steps in range(25) if make_evaluation().due(steps)] == [0, 10, 20]
    assert [steps for steps in range(25) if make_evaluation(eval={"every_steps": 0}).due(steps)] == [0]
    assert not make_evaluation(num_prompts=0).due(0)

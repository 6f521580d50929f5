"""Evaluation: which tickets a round has, and when it is complete."""

from collections.abc import Sequence
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
)
from penstock_trainer.data.prompts import EncodedPrompt, digest
from penstock_trainer.rollouts.evaluation import LOST, MOST_FAILED, NUMBERS_PER_LEASE, Evaluation
from tests.unit.trainer.numbered_prompts import PROMPTS, config, eval_set

SAMPLING = Sampling(0.6, 8, (2,), top_p=0.95)


def answered(ticket: Ticket, value: float | None, version: int = 0) -> ScoredGroup:
    span = VersionSpan(PolicyIdentity(version, "0" * 16), 0, 1)
    completion = Completion(pack_int32([5]), b"\x01", pack_float32([-0.5]), (span,), "text", "stop")
    group = RolloutGroup(ticket, (completion,), "s", 0.0, 1.0)
    score = Score(value) if value is not None else Score(None, "timeout")
    return ScoredGroup(group, (score,), ("exact_match",))


def evaluation_of(prompts: Sequence[EncodedPrompt], run: Config, num_trained: int = 0) -> Evaluation:
    return Evaluation([eval_set(prompts, SAMPLING, run.eval.main, num_trained=num_trained)], 5, run)


def make_evaluation(num_prompts: int = 4, **changes: Any) -> Evaluation:
    return evaluation_of(PROMPTS[:num_prompts], config(**changes), num_trained=1)


def test_a_round_ends_with_its_last_result() -> None:
    evaluation = make_evaluation()
    tickets = evaluation.start(10, 3)
    assert [ticket.number for ticket in tickets] == [5 * NUMBERS_PER_LEASE + n for n in range(4)]
    assert {(ticket.policy_version, ticket.sampling) for ticket in tickets} == {(3, SAMPLING)}
    values = [1.0, 0.5, None, 1.0]
    for n, (ticket, value) in enumerate(zip(reversed(tickets), values, strict=True)):
        assert evaluation.take_results() == []
        evaluation.record(answered(ticket, value, version=3 + n))
    [result] = evaluation.take_results()
    assert evaluation.take_results() == []
    assert (result.steps, result.num_prompts, result.num_scored, result.num_failed) == (10, 4, 3, 1)
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.reward_mean == pytest.approx(2.5 / 3)
    assert result.rewards["exact_match"]["mean"] == pytest.approx(2.5 / 3)
    assert result.rewards["exact_match"]["num_failed"] == 1
    assert (result.oldest_version, result.newest_version) == (3, 6)
    assert [sample.prompt for sample in result.samples] == ["p0", "p1", "p2", "p3"]
    assert (result.failures, result.success, result.num_trained) == ({"timeout": 1}, 1.0, 1)
    assert result.prompts == digest(PROMPTS[:4])
    assert evaluation.num_waiting == 0


def test_samples_are_shown_as_a_person_reads_them() -> None:
    text = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    prompt = EncodedPrompt(text, (1, 2), "4", "", {}, [{"role": "user", "content": "2 + 2?"}])
    evaluation = evaluation_of([prompt], config())
    [ticket] = evaluation.start(0, 0)
    group = answered(ticket, 1.0)
    [completion] = group.group.completions
    ended = msgspec.structs.replace(completion, text="4<|im_end|>\n")
    evaluation.record(msgspec.structs.replace(group, group=msgspec.structs.replace(group.group, completions=(ended,))))
    [sample] = evaluation.take_results()[0].samples
    assert (ticket.prompt, sample.prompt, sample.completion) == (text, "2 + 2?", "4")


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
    assert (result.accuracy, result.num_prompts, result.num_scored, result.num_failed) == (1.0, 2, 1, 1)
    assert result.failures == {LOST: 1}
    assert [(each.prompt, each.failure) for each in result.failed] == [("p1", LOST)]
    for number in (second.number, *(ticket.number for ticket in evaluation.start(1, 7))):
        evaluation.give_up(number)
    [result] = evaluation.take_results()
    assert (result.accuracy, result.reward_mean, result.num_failed, result.newest_version) == (None, None, 2, 7)
    assert evaluation.num_waiting == 0


def test_failed_rewards_are_in_no_mean_and_all_their_rows_are_recorded() -> None:
    evaluation = evaluation_of([PROMPTS[0]] * (MOST_FAILED + 10), config())
    tickets = evaluation.start(0, 0)
    for number, ticket in enumerate(tickets):
        evaluation.record(answered(ticket, 1.0 if number % 10 == 0 else None))
    [result] = evaluation.take_results()
    assert (result.accuracy, result.reward_mean, result.num_scored, result.num_failed) == (1.0, 1.0, 11, 99)
    assert len(result.failed) == 99
    assert {(each.reward, each.failure, each.completion) for each in result.failed} == {(None, "timeout", "text")}
    for ticket in evaluation.start(10, 1):
        evaluation.record(answered(ticket, None))
    [result] = evaluation.take_results()
    assert (result.accuracy, result.reward_mean, result.num_scored) == (None, None, 0)
    assert len(result.failed) == MOST_FAILED


def test_prompts_of_several_completions_are_the_unit_of_all_figures() -> None:
    evaluation = make_evaluation(num_prompts=3, eval={"temperature": 0.6, "samples_per_prompt": 4})
    tickets = evaluation.start(0, 0)
    assert {len(ticket.seeds) for ticket in tickets} == {1}
    assert len({ticket.seeds for ticket in tickets}) == len(tickets) == evaluation.num_waiting == 12
    assert [ticket.prompt for ticket in tickets[3:9]] == ["p0", "p1", "p1", "p1", "p1", "p2"]
    values = [1.0, 1.0, 0.5, 0.0, 1.0, None, None, 0.0, None, None, None]
    for ticket, value in zip(tickets, values, strict=False):
        evaluation.record(answered(ticket, value))
    evaluation.give_up(tickets[-1].number)
    [result] = evaluation.take_results()
    assert (result.num_prompts, result.num_scored, result.num_failed) == (3, 2, 1)
    assert (result.accuracy, result.reward_mean) == (0.5, (2.5 / 4 + 0.5) / 2)
    assert {k: each["value"] for k, each in result.pass_at.items()} == pytest.approx(
        {"1": 0.5, "2": (5 / 6 + 1) / 2, "4": 1.0}
    )
    assert result.accuracy_interval["low"] < 0.5 < result.accuracy_interval["high"]
    assert result.failures == {"timeout": 5, LOST: 1}
    assert [each.prompt for each in result.samples] == ["p0", "p1", "p2"]
    assert [each.prompt for each in result.failed] == ["p1", "p1", "p2", "p2", "p2", "p2"]


def test_when_an_evaluation_is_due() -> None:
    assert [steps for steps in range(25) if make_evaluation().due(steps)] == [0, 10, 20]
    assert [steps for steps in range(25) if make_evaluation(eval={"every_steps": 0}).due(steps)] == [0]
    assert not make_evaluation(num_prompts=0).due(0)


def test_each_set_has_rounds_of_its_own_with_its_sampling_and_its_success() -> None:
    run = config(eval={"temperature": 0.5, "num_shown": 1})
    short, hot = msgspec.structs.replace(SAMPLING, max_new_tokens=2), msgspec.structs.replace(SAMPLING, temperature=0.9)
    twice = run.eval.main.model_copy(update={"samples_per_prompt": 2, "success": 0.5})
    hard = eval_set(PROMPTS[2:4], hot, twice, name="hard", num_trained=2)
    evaluation = Evaluation([eval_set(PROMPTS[:2], short, run.eval.main), hard], 5, run)
    assert evaluation.sets == ("main", "hard")
    tickets = evaluation.start(10, 3)
    assert [(ticket.prompt, ticket.sampling) for ticket in tickets] == [
        ("p0", short), ("p1", short), ("p2", hot), ("p2", hot), ("p3", hot), ("p3", hot)
    ]  # fmt: skip
    assert [ticket.number - tickets[0].number for ticket in tickets] == list(range(6))
    for ticket in tickets[2:]:
        evaluation.record(answered(ticket, 0.5))
    [first] = evaluation.take_results()
    assert (first.set, first.steps, first.accuracy, first.success, first.samples_per_prompt) == (
        "hard",
        10,
        1.0,
        0.5,
        2,
    )
    assert (first.num_prompts, first.num_trained, first.prompts) == (2, 2, digest(PROMPTS[2:4]))
    assert evaluation.num_waiting == 2
    for ticket in tickets[:2]:
        evaluation.record(answered(ticket, 0.5))
    [second] = evaluation.take_results()
    assert (second.set, second.accuracy, second.pass_at, second.prompts) == ("main", 0.0, {}, digest(PROMPTS[:2]))
    assert [ticket.prompt for ticket in evaluation.start(20, 4, ["hard"])] == ["p2", "p2", "p3", "p3"]

"""What each built-in reward accepts and refuses: two hundred completions each, with their correct values.

The files hold one JSON list per line: completion, answer, value (`format_regex`: completion, pattern, value;
`reasoning_gym`: completion, task, the entry's answer, value; 0 means less than 1, since tasks give partial credit).
They were written by hand; a value is what a careful reader would give by the rules of docs/rewards.md.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from penstock_reward.functions.mathematics import MAX_PROSE_CHARS
from penstock_reward.functions.registry import RewardFunction, builtins, load

PAIRS = Path(__file__).parent / "pairs"
LEAST_PAIRS = 200


def lines(name: str) -> list[list[Any]]:
    return [json.loads(line) for line in (PAIRS / f"{name}.jsonl").read_text().splitlines()]


def wrong(name: str, function: RewardFunction) -> list[str]:
    """The lines for which the reward gives another value."""
    found = []
    for completion, answer, value in lines(name):
        metadata = {"pattern": answer} if name == "format_regex" else {}
        got = function(prompt="", completion=completion, answer=answer, metadata=metadata)
        if got != value:
            found.append(f"{json.dumps([completion, answer, value])}: {got}")
    return found


@pytest.mark.parametrize("name", ["exact_match", "numeric", "gsm8k", "math", "format_regex"])
def test_every_pair_has_its_value(name: str) -> None:
    assert wrong(name, load(name)) == []


def test_every_pair_of_reasoning_gym_has_its_value() -> None:
    function, found = load("reasoning_gym"), []
    for completion, task, answer, value in lines("reasoning_gym"):
        entry = {"question": "", "answer": answer, "metadata": {}}
        got = function(prompt="", completion=completion, answer="", metadata={"task": task, "entry": entry})
        if not 0 <= got <= 1 or (got == 1) != bool(value):
            found.append(f"{json.dumps([completion, task, answer, value])}: {got}")
    assert found == []


def gym(completion: str, task: str, answer: str | None, **metadata: Any) -> float:
    entry = {"question": "", "answer": answer, "metadata": metadata}
    return float(
        load("reasoning_gym")(prompt="", completion=completion, answer="", metadata={"task": task, "entry": entry})
    )


@pytest.mark.parametrize(("task", "answer"), [("prime_factorization", "two"), ("rubiks_cube", None)])
def test_an_entry_on_which_the_scorer_raises_without_the_model_is_the_rows_fault(task: str, answer: str | None) -> None:
    with pytest.raises((ValueError, KeyError)):
        gym("7", task, answer)


def test_a_task_that_pays_for_a_copy_of_the_question_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"metadata\.task is 'propositional_logic': its scorer pays in full"):
        gym("(P -> Q)", "propositional_logic", None, premises=["(P -> Q)"], variables=["P", "Q"])


def test_there_are_two_hundred_different_pairs_of_each() -> None:
    for name in builtins():
        texts = (PAIRS / f"{name}.jsonl").read_text().splitlines()
        assert len(set(texts)) == len(texts) >= LEAST_PAIRS, name


UNITS = [
    "x = 7, ", "7 ", "the answer is 7 ", "final answer is ", "$x$ ", "\\boxed{1} ", "\\boxed{", "\\frac{1}{2} ", "(",
    "1+", "####\n", "#### 1. x\n", "<think>", "</think>", "<answer>", "wait, let me check ", "1,", "1,22,", "1/", "1:",
    "1.", "\\sqrt{2}", "**", "{", "\\", "\\[ x ", "\\boxed{1} and ", "1", " ", "2^", "1_000", "answer is A ",
]  # fmt: skip


@pytest.mark.parametrize("name", ["numeric", "gsm8k", "math"])
def test_a_model_that_repeats_itself_costs_little(name: str) -> None:
    """Loops of 32000 characters, in a box too. math-verify alone took up to 14 seconds for one."""
    function = load(name)
    function(prompt="", completion="7", answer="7", metadata={})
    for unit in UNITS:
        text = unit * (32_000 // len(unit))
        for completion in (
            text,
            f"\\boxed{{{text}}}",
            f"<answer>{text}</answer>",
            f"{text[:400]}$",
            f"\\boxed{{{text[:400]}}}",
        ):
            began = time.process_time()
            function(prompt="", completion=completion, answer="7", metadata={})
            assert time.process_time() - began < 2, (unit, completion[:20])


def test_a_long_text_is_judged_by_its_end() -> None:
    function = load("math")
    long = "Let me think about it once more. " * 1000
    for completion, value in ((f"{long} So the answer is 42.", 1), (f"The answer is 42. {long}", 0)):
        assert len(completion) > MAX_PROSE_CHARS
        assert function(prompt="", completion=completion, answer="42", metadata={}) == value

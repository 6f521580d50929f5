"""The calculator: its committed files, and the rules of its environment."""

import json
from pathlib import Path

import pytest

from examples.calculator.calculator import Calculator
from examples.calculator.sums import NUM_HELD_OUT, NUM_TRAIN, SHOWN, lines

FOLDER = Path(__file__).parents[3] / "examples" / "calculator"


def test_the_committed_dataset_is_what_its_program_writes() -> None:
    train, held_out = lines()
    assert (FOLDER / "sums_train.jsonl").read_text().splitlines() == train
    assert (FOLDER / "sums_heldout.jsonl").read_text().splitlines() == held_out


def test_every_sum_is_there_once_and_right() -> None:
    seen = set()
    for line in [each for part in lines() for each in part]:
        row = json.loads(line)
        question = row["prompt"].removeprefix(f"{SHOWN}Q: ").removesuffix("\n")
        first, second = map(int, question.split("+"))
        assert 10 <= min(first, second) <= max(first, second) <= 99
        assert row["answer"] == str(first + second)
        seen.add((first, second))
    assert len(seen) == NUM_TRAIN + NUM_HELD_OUT


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("calc 52+39", "= 91\n"),
        ("calc 1+1", "= 2\n"),
        ("A: 91", 1.0),
        ("A: 92", 0.0),
        ("A: 91\n", 0.0),
        ("calc 52+39=91", 0.0),
        ("calc 5-3", 0.0),
        ("", 0.0),
    ],
)
def test_a_call_is_answered_and_any_other_line_is_scored(text: str, result: str | float) -> None:
    calculator = Calculator()
    calculator.reset(answer="91", prompt=SHOWN)
    assert calculator.step(text) == result

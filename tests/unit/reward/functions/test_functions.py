"""The built-in rewards: a table per function, and properties of the number grammar."""

import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.contracts.vocabulary import BUILTIN_REWARDS
from penstock.errors import RewardError
from penstock_reward.functions.numerals import find_numbers, last_number
from penstock_reward.functions.reasoning_tasks import tagged_answer
from penstock_reward.functions.registry import builtins, check_names, load


def score(name: str, completion: str, answer: str, **metadata: Any) -> float:
    return float(load(name)(prompt="", completion=completion, answer=answer, metadata=metadata))


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("7", "7", 1),
        (" 7\n", "7", 1),
        ("7", " 7 ", 1),
        ("7\n8+4=12", "7", 0),  # up to the completion's end, not up to the first line
        ("7.", "7", 0),
        ("Yes", "yes", 0),
        ("", "", 1),
        ("", "7", 0),
    ],
)
def test_exact_match(completion: str, answer: str, expected: float) -> None:
    assert score("exact_match", completion, answer) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("7", "7", 1),
        ("2+5=7", "7", 1),
        ("first 3, then 12.", "12", 1),
        ("12 then 3", "12", 0),
        ("It is $1,234.50 in all.", "1234.5", 1),
        ("1,234,567", "1234567", 1),
        ("1,2,3", "3", 1),
        ("-5", "-5", 1),
        ("\u22125", "-5", 1),
        ("x = +5", "5", 1),
        ("(10)-3", "3", 1),
        ("10-3", "3", 1),
        ("- 3", "3", 1),
        ("5", "-5", 0),
        ("-$5", "-5", 1),
        ("3/4", "0.75", 1),
        ("0.75", "3/4", 1),
        ("-3/4", "-0.75", 1),
        ("6/2", "3", 1),
        ("1/0", "1", 0),
        ("12/31/2024", "2024", 0),
        ("0.333333", "1/3", 1),
        ("0.333", "1/3", 0),
        ("1000000001", "1000000002", 0),  # integers are compared exactly, however large
        ("1e3", "1000", 1),
        ("1.5E-2", "0.015", 1),
        ("1e999999999", "5", 0),
        ("-1e999999999", "5", 0),
        ("1e-999999999", "0", 0),
        ("x7 and b_8", "7", 0),  # names are not numbers
        ("50%", "50", 1),
        ("50", "50%", 1),
        ("18", "$18.", 1),
        ("no number", "7", 0),
        ("", "7", 0),
        (".5", "0.5", 1),
        ("007", "7", 1),
    ],
)
def test_numeric(completion: str, answer: str, expected: float) -> None:
    assert score("numeric", completion, answer) == expected


def test_numeric_takes_a_tolerance_from_the_row() -> None:
    assert score("numeric", "3.1", "3.14159", tolerance=0.1) == 1
    assert score("numeric", "3.1", "3.14159", tolerance=0.01) == 0
    with pytest.raises(ValueError, match=r"metadata\.tolerance is 'wide'"):
        score("numeric", "3.1", "3.14159", tolerance="wide")


@pytest.mark.parametrize("name", ["numeric", "gsm8k"])
def test_an_answer_that_is_no_number_is_the_rows_fault(name: str) -> None:
    with pytest.raises(ValueError, match="the answer is 'seven'"):
        score(name, "7", "seven")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("She makes 9 * 2 = 18.\n#### 18", 1),
        ("#### 18 dollars and 5 cents", 1),
        ("#### 1,8", 0),
        ("#### 18\n\nQuestion: what else?\n#### 20", 1),
        ("18\n#### 20", 0),
        ("18\n####", 0),
        ("The answer is 18.", 1),
        ("18 or 19", 0),
        ("", 0),
    ],
)
def test_gsm8k(completion: str, expected: float) -> None:
    answer = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"
    assert score("gsm8k", completion, answer) == expected
    assert score("gsm8k", completion, "18") == expected


def test_gsm8k_reads_thousands() -> None:
    assert score("gsm8k", "#### 70,000", "... #### 70000") == 1


@pytest.mark.parametrize(
    ("pattern", "completion", "expected"),
    [
        (r"^\d+$", "12", 1),
        (r"^\d+$", "12 apples", 0),
        (r"\d+", "12 apples", 1),
        (r"(?s)^<think>.*</think>\s*<answer>.*</answer>$", "<think>a\nb</think>\n<answer>7</answer>", 1),
    ],
)
def test_format_regex(pattern: str, completion: str, expected: float) -> None:
    assert score("format_regex", completion, "", pattern=pattern) == expected


@pytest.mark.parametrize("metadata", [{}, {"pattern": 3}, {"pattern": ""}, {"pattern": "("}])
def test_format_regex_without_a_usable_pattern_is_the_rows_fault(metadata: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"metadata\.pattern"):
        score("format_regex", "x", "", **metadata)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("The answer is $\\frac{1}{2}$.", "1/2", 1),
        ("\\boxed{0.5}", "\\frac{1}{2}", 1),
        ("$x^2 + 2x + 1$", "(x+1)^2", 1),
        ("$2\\sqrt{3}$", "2\\sqrt{3}", 1),
        ("2\\sqrt{3}", "2\\sqrt{3}", 1),
        ("2\\sqrt{3}", "2", 0),  # bare LaTeX is not the first number in it
        ("2", "2\\sqrt{3}", 0),
        ("$(1,2)$", "(1,2)", 1),
        ("$\\{2, 1\\}$", "\\{1,2\\}", 1),
        ("72 dollars", "72 dollars", 1),
        ("So she has 72.", "72 dollars", 1),
        ("no idea", "72", 0),
        ("", "72", 0),
    ],
)
def test_math(completion: str, answer: str, expected: float) -> None:
    assert score("math", completion, answer) == expected


def test_math_without_a_readable_answer_is_the_rows_fault() -> None:
    with pytest.raises(ValueError, match="math expected an expression"):
        score("math", "7", "")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("7", "7"),
        (" 7 ", "7"),
        ("<answer>7</answer>", "7"),
        ("<answer>1</answer> no: <answer> 7\n</answer> done", "7"),
        ("<answer>7", "7"),
        ("7</answer>", "7"),
        ("<think><answer>8</answer></think>7", "7"),
        ("<answer>1<answer>7</answer>", "7"),
    ],
)
def test_tagged_answer(completion: str, expected: str) -> None:
    assert tagged_answer(completion) == expected


def test_every_builtin_has_a_description() -> None:
    names = {"exact_match", "numeric", "math", "gsm8k", "format_regex", "reasoning_gym"}
    assert set(builtins()) == names
    assert set(BUILTIN_REWARDS) == names  # which the trainer checks rows with
    assert all(builtin.description for builtin in builtins().values())


def test_names_are_checked_without_importing_anything() -> None:
    check_names(["exact_match", "no_such_module:reward"])
    with pytest.raises(RewardError, match=r"reward\.functions names 'exactmatch'.*did you mean 'exact_match'"):
        check_names(["exactmatch"])


@given(st.integers(-(10**30), 10**30))
def test_an_integer_in_any_dress_is_itself(number: int) -> None:
    for text in (str(number), f"{number:,}", f"so it is {number}.", f"1 + 1 = {number} ", f"{number}.0", f"({number})"):
        assert score("numeric", text, str(number)) == 1
        assert score("numeric", text, str(number + 1)) == 0


@given(st.decimals(-1000000, 1000000, places=4), st.text("abc =+\n", max_size=20))
def test_the_last_number_is_found_whatever_stands_around_it(number: Decimal, text: str) -> None:
    assert last_number(f"{text}3 = {number}\n") == number


@settings(max_examples=50)
@given(st.text(max_size=50))
def test_any_text_can_be_read(text: str) -> None:
    for number in find_numbers(text):
        assert number is None or number.is_finite()
    assert score("numeric", text, "123456789.123") == 0


def cost(text: str) -> float:
    """CPU seconds, whatever else runs; the least of several runs."""

    def once() -> float:
        began = time.process_time()
        find_numbers(text)
        tagged_answer(text)
        return time.process_time() - began

    return min(once() for _ in range(5))


@pytest.mark.parametrize("text", ["1,", "1", "<answer>", "1/", "1,111"])
def test_the_cost_of_a_completion_grows_with_its_length_alone(text: str) -> None:
    """Eight times the text costs about eight times as much; an algorithm that rescans the text would cost 64 times."""
    assert cost(text * 80_000) < 24 * max(cost(text * 10_000), 0.0005)

r"""The built-in reward `math`: whether two texts are the same mathematics, by math-verify.

Owns the input of math-verify, and the cases that need no math-verify: letters and numbers. Made by a factory, so that
the import happens once per worker process, outside the deadline of a call.

    completion --> answer (thinking, tags, box) --> a letter is expected -----------------> choices
                                                |-> it is one number, and so is expected -> numerals
                                                |-> one formula: $...$ ---.
                                                '-> prose: its end -------'--> math-verify
"""

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any

from penstock_reward.functions.answers import Given, given_answer
from penstock_reward.functions.choices import choice_letter, chosen_letter
from penstock_reward.functions.numerals import equal, sole_number

RewardFunction = Callable[..., Any]

MAX_PROSE_CHARS = 2000  # of the end of a text, which holds its answer: the search for formulas is not linear
MAX_FORMULA_CHARS = 500
MAX_DEPTH = 30  # of brackets: the parser takes seconds for hundreds that are never closed
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|operatorname|begin|end)\s?\{[^{}]*\}")
_DELIMITED = re.compile(
    r"(?:\$\$|\\\[|\\\()(?P<inside>(?:(?!\$|\\\[|\\\]|\\\(|\\\)).)+)(?:\$\$|\\\]|\\\))|\$(?P<dollar>[^$]+)\$", re.DOTALL
)
_EMPHASIS = re.compile(
    r"\*\*(?=\S)(?P<bold>[^*\n]+?)(?<=\S)\*\*|`(?P<code>[^`\n]+)`|(?<!\w)__(?P<under>[^_\n]+)__(?!\w)"
)
_CURRENCY = re.compile(r"\\\$|(?<![0-9$}])\$(?=[0-9][0-9.,]*(?:[^0-9.,$\\^_+*/=-]|[.,]?$))")
_EDGES = " \t\n.,;:*`\u2009"


def make_math() -> RewardFunction:
    """1 if completion and answer are the same mathematics (math-verify: LaTeX, fractions, sets, intervals)."""
    import logging

    from math_verify import parse, verify

    # Its own time limits are off: at a limit it answers "not equal", which would be a 0 that no function measured.
    # Instead this process is killed at the deadline, and the call counts as failed. math-verify warns about that once.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(given: Given) -> list[Any]:
        formula = _formula(given)
        if _depth(formula or _prose(given.text)) > MAX_DEPTH:
            return []
        if formula:
            return list(parse(f"${formula}$", parsing_timeout=None) or parse(formula, parsing_timeout=None))
        return list(parse(_prose(given.text), parsing_timeout=None))

    read_answer = lru_cache(maxsize=16)(lambda answer: read(given_answer(answer)))  # one answer serves a full group

    def math(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
        given = given_answer(completion)
        if letter := choice_letter(given_answer(answer).text):
            return float(chosen_letter(given.text) == letter)
        expected = read_answer(answer)
        if not expected:
            raise ValueError(f"the answer is {answer[:80]!r}; math expected an expression that math-verify can read")
        verdict = _same_number(given, answer)
        if verdict is None:
            found = read(given)
            verdict = bool(found and verify(expected, found, timeout_seconds=None)) and _close(expected[0], found[0])
        return float(verdict)

    return math


def _formula(given: Given) -> str:
    """The text as one formula without delimiters; empty if it is prose."""
    text = _EMPHASIS.sub(_inside, given.text).strip(_EDGES)
    whole = _DELIMITED.fullmatch(text)
    if whole is not None:
        text = (whole["inside"] or whole["dollar"]).strip(_EDGES)
    text = text.replace(r"\$", "").replace(r"\!", "")
    if len(text) > MAX_FORMULA_CHARS or (not given.boxed and "\n" in text):
        return ""
    if given.boxed:  # 5! in a box is 120, "42!" in a text is 42
        return text.replace("$", "").replace("\n", " ")
    is_prose = any(mark in text for mark in ("$", "\\(", "\\[")) or _WORD.search(_TEXT.sub("", text))
    return "" if is_prose else text.rstrip("!")


def _inside(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None)


def _prose(text: str) -> str:
    """The end of a text, without emphasis and currency, in which math-verify finds the answer."""
    if len(text) > MAX_PROSE_CHARS:
        text = text[-MAX_PROSE_CHARS:].partition(" ")[2]
    return _CURRENCY.sub("", _EMPHASIS.sub(_inside, text))


def _depth(text: str) -> int:
    """The largest number of brackets that are open at once, those that are never closed included."""
    deepest = depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    return deepest


def _same_number(given: Given, answer: str) -> bool | None:
    """Whether both are the same number; None if one of them is not a single number."""
    text = _formula(given)
    expected = sole_number(_formula(given_answer(answer)) if "=" not in answer else "")
    found = sole_number(text) if text else None
    if expected is None or found is None:
        return None
    if equal(found, expected):
        return True
    return None if "%" in answer or "%" in text else False


def _close(expected: Any, found: Any) -> bool:
    """False for two numbers that are the same to six decimals only because both are small."""
    try:
        numbers = [Decimal(str(each.evalf(20))) for each in (expected, found)]
    except (AttributeError, InvalidOperation, TypeError, ValueError, ArithmeticError):
        return True  # not real numbers: math-verify decides
    answer, value = numbers
    percent = Decimal(100)
    return any(equal(each, answer) for each in (value, value * percent, value / percent))

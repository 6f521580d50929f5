"""The built-in rewards that need only the text.

Owns their rules; docs/rewards.md states them for users. Invariant: a reward function raises only if the row is at
fault (no usable answer, no pattern), never because of the model's text.

Every reward function, built in or the user's own, has this signature, sync or async; it is called with keywords:

    def reward(prompt: str, completion: str, answer: str, metadata: dict) -> float
"""

import re
from decimal import Decimal
from typing import Any

from penstock_reward.functions.answers import given_answer, spoken, tagged
from penstock_reward.functions.numerals import equal, last_number, leading_number, sole_number, whole_number_text

GSM8K_MARK = "####"
_MARKED_LINE = re.compile(r"(?<!#)####(?!#)[ \t]*(?P<line>[^\n]*)")
_LEAD = re.compile(
    r"(?:\*\*|__|`|\\\(|\\\[|\$\$|\\boxed\s*\{|(?:the\s+)?(?:final\s+)?(?:answer|result)(?:\s+is|\s*=)?|[:=]|[ \t])*",
    re.IGNORECASE,
)
_LIST_ITEM = re.compile(r"\s*(?:[.):]\s+\S|\)|:)")  # after a number: "1. Add", "1) Add", "1: Add" are headings


def exact_match(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the whole completion is the answer; white space at both ends does not count, all else does."""
    return float(completion.strip() == answer.strip())


def numeric(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the number in the completion's box, else its last number, equals the answer (metadata `tolerance`)."""
    expected = whole_number_text(given_answer(answer).text)
    found = given_number(completion)
    return float(found is not None and equal(found, expected, _tolerance(metadata)))


def given_number(completion: str) -> Decimal | None:
    """The number that a completion gives as its answer: the full content of its last box, or its last number."""
    given = given_answer(completion)
    return sole_number(given.text) if given.boxed else last_number(given.text)


def gsm8k(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the number after the completion's first `####` (without one: as for numeric) is that of the answer."""
    expected = whole_number_text(given_answer(answer.rpartition(GSM8K_MARK)[2]).text)
    found = _marked_number(completion)
    return float(found is not None and equal(found, expected))


def _marked_number(completion: str) -> Decimal | None:
    """The number after the first mark that has one; a mark before words or a list's number is a heading."""
    text = tagged(spoken(completion))
    for match in _MARKED_LINE.finditer(text):
        line = match["line"]
        if not line and match.end() == len(text):
            return None  # cut off before the answer
        lead = _LEAD.match(line)
        marked = leading_number(line[lead.end() if lead else 0 :])
        if marked is None or _LIST_ITEM.match(marked[1]):
            continue
        if "=" in marked[1]:
            return last_number(marked[1].rpartition("=")[2])
        return marked[0]
    return given_number(completion)


def format_regex(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the regular expression in metadata `pattern` is found in the completion."""
    pattern = metadata.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"metadata.pattern is {pattern!r}; format_regex expected a regular expression")
    try:
        return float(re.search(pattern, completion) is not None)
    except re.error as error:
        raise ValueError(f"metadata.pattern is {pattern!r}: {error}; expected a regular expression") from None


def _tolerance(metadata: dict[str, Any]) -> Decimal | None:
    given = metadata.get("tolerance")
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < float("inf"):
        raise ValueError(f"metadata.tolerance is {given!r}; numeric expected a number >= 0")
    return Decimal(str(given))

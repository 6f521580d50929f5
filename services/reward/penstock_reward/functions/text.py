"""The built-in rewards that need nothing but the text.

Owns their rules; docs/rewards.md states them for users. Invariant: a reward function raises only where the row is at
fault (no usable answer, no pattern), never because of what the model wrote. Called through `registry` in the worker
processes. Those that need a library are in `libraries`.

Every reward function, built in or the user's own, has this signature, sync or async; it is called with keywords:

    def reward(prompt: str, completion: str, answer: str, metadata: dict) -> float
"""

import re
from decimal import Decimal
from typing import Any

from penstock_reward.functions.numerals import equal, find_numbers, last_number, whole_number_text

GSM8K_MARK = "####"


def exact_match(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the whole completion is the answer; white space at both ends does not count, all else does."""
    return float(completion.strip() == answer.strip())


def numeric(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the last number in the completion equals the answer (metadata `tolerance`: largest absolute difference)."""
    expected = whole_number_text(answer)
    found = last_number(completion)
    return float(found is not None and equal(found, expected, _tolerance(metadata)))


def gsm8k(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the number after the completion's first `####` (without one: its last number) is that of the answer."""
    expected = whole_number_text(answer.rpartition(GSM8K_MARK)[2])
    _, mark, rest = completion.partition(GSM8K_MARK)
    if mark:
        numbers = find_numbers(rest.split("\n", 1)[0])
        found = numbers[0] if numbers else None
    else:
        found = last_number(completion)
    return float(found is not None and equal(found, expected))


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

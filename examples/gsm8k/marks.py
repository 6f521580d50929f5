"""How GSM8K's answers are marked: two rewards beside the built-in `gsm8k`, which is lenient.

`gsm8k` takes the last number of a completion that has no `####`; a benchmark's strict score does not.
"""

import re
from typing import Any

MARKED = re.compile(r"#### (-?[0-9.,]+)")  # the strict filter of lm-evaluation-harness
ENDS_MARKED = re.compile(r"#### -?[0-9][0-9.,]*\s*$")


def strict(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the first `#### number` of the completion is that of the answer, digit by digit; else 0.

    >>> strict("", "6 * 7 = 42\\n#### 42", "6*7=<<6*7=42>>42\\n#### 42", {})
    1.0
    >>> strict("", "The answer is 42", "6*7=<<6*7=42>>42\\n#### 42", {})
    0.0
    """
    found = MARKED.search(completion)
    return float(found is not None and _plain(found[1]) == _plain(answer.rpartition("####")[2]))


def marked(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 if the completion ends with `#### number`, whatever the number; else 0."""
    return float(ENDS_MARKED.search(completion) is not None)


def _plain(number: str) -> str:
    return number.replace(",", "").strip().rstrip(".")

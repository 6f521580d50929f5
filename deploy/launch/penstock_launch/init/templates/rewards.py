"""What an answer is worth: a number for each completion.

Penstock calls the function in a worker process, with the keywords below. It may be `async`. If it raises, or takes
longer than `reward.timeout_seconds`, the completion has no reward and is not trained; it is never a 0.
"""

from difflib import SequenceMatcher
from typing import Any


def one_word(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """1 for the answer and nothing else; for any other text less than 0.5, the more alike, the more."""
    text = completion.strip()
    return 1.0 if text == answer else 0.5 * SequenceMatcher(None, text, answer).ratio()

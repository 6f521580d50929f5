"""The built-in rewards that need a library: `math` (math-verify) and `reasoning_gym`.

Owns how they are called. Each is made by a factory, so that the import happens once per worker process, outside the
deadline of a call, and only where the reward is used. Called through `registry`.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

RewardFunction = Callable[..., Any]

_DELIMITERS = ("$", "\\(", "\\[", "\\boxed")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_OPEN, _CLOSE = "<answer>", "</answer>"


def make_math() -> RewardFunction:
    """1 if completion and answer are the same mathematics (math-verify: LaTeX, fractions, sets, intervals)."""
    import logging

    from math_verify import parse, verify

    # Its own time limits are off: where they strike it answers "not equal", which would be a 0 that nobody measured.
    # This process is killed at the deadline instead, and the call counts as failed. It warns about that once.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text: str) -> list[Any]:
        # Without delimiters math-verify takes "2\sqrt{3}" for the number 2, and knows no "(1,2)".
        stripped = text.strip()
        bare = not any(mark in stripped for mark in _DELIMITERS)
        if bare and not _WORD.search(stripped) and "\n" not in stripped:
            return list(parse(f"${stripped}$", parsing_timeout=None) or parse(stripped, parsing_timeout=None))
        found = list(parse(text, parsing_timeout=None))
        return found or (list(parse(f"${stripped}$", parsing_timeout=None)) if bare else [])

    read_answer = lru_cache(maxsize=16)(read)  # one answer serves a whole group

    def math(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
        expected = read_answer(answer)
        if not expected:
            raise ValueError(f"the answer is {answer[:80]!r}; math expected an expression that math-verify can read")
        return float(verify(expected, read(completion), timeout_seconds=None))

    return math


def make_reasoning_gym() -> RewardFunction:
    """The score that the reasoning-gym task gives its own entry (metadata `task` and `entry`)."""
    from reasoning_gym import get_score_answer_fn

    scorer_of = lru_cache(maxsize=None)(get_score_answer_fn)
    settled: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def restore(task: str, entry: dict[str, Any]) -> dict[str, Any]:
        # A message has lists where some tasks compare with tuples (arc_agi), and such a task then scores everything
        # as wrong without a word. The form in which the entry accepts its own answer is the right one.
        if settled and settled[0][:2] == (task, entry):
            return settled[0][2]
        score, oracle = scorer_of(task), entry.get("answer")
        restored = entry
        if oracle is not None and score(oracle, entry=entry) < 1:
            tuples = {**entry, "metadata": _with_tuples(entry["metadata"])}
            if score(oracle, entry=tuples) > score(oracle, entry=entry):
                restored = tuples
        settled[:] = [(task, entry, restored)]
        return restored

    def reasoning_gym(prompt: str, completion: str, answer: str, metadata: dict[str, Any]) -> float:
        task, entry = metadata.get("task"), metadata.get("entry")
        if not isinstance(task, str) or not isinstance(entry, dict) or not isinstance(entry.get("metadata"), dict):
            seen = sorted(map(str, metadata))
            raise ValueError(
                f"metadata holds {seen}; reasoning_gym expected `task`, a name, and `entry`, its whole item"
            )
        return float(scorer_of(task)(tagged_answer(completion), entry=restore(task, entry)))

    return reasoning_gym


def tagged_answer(completion: str) -> str:
    """What stands in the last <answer>...</answer>, else the whole completion; without white space around it."""
    before, close, _ = completion.rpartition(_CLOSE)
    _, opened, inside = before.rpartition(_OPEN)
    return (inside if close and opened else completion).strip()


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return value

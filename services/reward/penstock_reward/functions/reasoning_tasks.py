"""The built-in reward `reasoning_gym`: the score that a task of that library gives.

Owns the calls of its scorers, and the scorers that are replaced. Made by a factory, so that the import happens once per
worker process, outside the deadline of a call. Invariant: a scorer that raises on the model's text
gives 0; one that raises on the entry's own answer, or a task that rewards every text, is the row's fault.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from penstock.contracts.vocabulary import UNUSABLE_TASKS
from penstock_reward.functions.answers import spoken, tagged

RewardFunction = Callable[..., Any]
Entry = dict[str, Any]


def make_reasoning_gym() -> RewardFunction:
    """The score that the reasoning-gym task gives its own entry (metadata `task` and `entry`)."""
    from reasoning_gym import get_score_answer_fn

    scorer_of = lru_cache(maxsize=None)(get_score_answer_fn)
    settled: list[tuple[str, Entry, Entry]] = []

    def restore(task: str, entry: Entry) -> Entry:
        # A message has lists, but some tasks compare with tuples (arc_agi): such a task silently scores every answer
        # as wrong. The form in which the entry accepts its own answer is the right one.
        if settled and settled[0][:2] == (task, entry):
            return settled[0][2]
        score, oracle = scorer_of(task), entry.get("answer")
        restored = entry
        if oracle is None:
            score("", entry=entry)  # raises on an entry that lacks a field of the task, so that the model is not blamed
        elif score(oracle, entry=entry) < 1:
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
        if task in UNUSABLE_TASKS:
            raise ValueError(f"metadata.task is {task!r}: {UNUSABLE_TASKS[task]}; expected another task")
        text, restored = tagged_answer(completion), restore(task, entry)
        if task in REPAIRED:
            return REPAIRED[task](text, restored, scorer_of(task))
        return attempt(scorer_of(task), text, restored)

    return reasoning_gym


def attempt(score: RewardFunction, text: str, entry: Entry) -> float:
    """The task's score; 0 if the text makes its scorer raise. The entry itself is valid: it was tested."""
    try:
        return float(score(text, entry=entry))
    except (MemoryError, OSError):
        raise  # the host's fault
    except Exception:
        return 0.0


def tagged_answer(completion: str) -> str:
    """The content of the last answer tag after the thinking, else the full text; without white space around it."""
    return tagged(spoken(completion))


def _same_text(text: str, entry: Entry, score: RewardFunction) -> float:
    return float(text.strip(" .*`").casefold() == str(entry["answer"]).casefold())


def _all_or_nothing(text: str, entry: Entry, score: RewardFunction) -> float:
    return float(attempt(score, text, entry) >= 1)


REPAIRED: Mapping[str, Callable[[str, Entry, RewardFunction], float]] = {
    "game_of_life_halting": _same_text,  # its scorer gives 1 to any text: bool("False") is true
    "knights_knaves": _all_or_nothing,  # up to 0.65 for the question itself, which has every name and role
}
"""Tasks whose own scorer rewards every text, and the scorer in its place."""


def _with_tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_with_tuples, value))
    if isinstance(value, dict):
        return {key: _with_tuples(each) for key, each in value.items()}
    return value

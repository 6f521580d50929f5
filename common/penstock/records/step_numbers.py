"""Steps as people number them, and as files name them.

Owns the mapping. People count from 1: step 12 is the twelfth, and after it 12 steps are done. Files name a step by its
id, the number of steps before it: `step` in their lines, the names of step files, the ledger. Pure.
"""

import re
from collections.abc import Iterable

from penstock.errors import ConfigError

_RANGE = re.compile(r"(?P<one>\d+)|(?P<first>\d*):(?P<last>\d*)")


def number_of(step: int) -> int:
    """The number of the step with this id.

    >>> number_of(0)
    1
    """
    return step + 1


def id_of(number: int) -> int:
    """The id of the step with this number; ConfigError if there is none.

    >>> id_of(1), id_of(number_of(7))
    (0, 7)
    """
    if number < 1:
        raise ConfigError(f"saw step {number}; expected steps from 1 on: the first one is step 1")
    return number - 1


def parse_steps(text: str) -> tuple[int | None, int | None]:
    """The ids [first, end) of steps in the notation of --steps; None for an end that is left out; ConfigError.

    >>> parse_steps("10:20"), parse_steps("3"), parse_steps(":5")
    ((9, 20), (2, 3), (None, 5))
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ConfigError(f"--steps: saw {text!r}; expected A:B, steps A to B, such as 10:20, 10: or :20, or one step")
    first, last = (match["one"] or match[name] or "" for name in ("first", "last"))
    if any(bound and not int(bound) for bound in (first, last)):
        raise ConfigError(f"--steps: saw {text!r}; expected steps from 1 on: the first one is step 1")
    if first and last and int(last) < int(first):
        raise ConfigError(f"--steps: saw {text!r}, which holds no step; expected A:B with B no less than A")
    return (int(first) - 1 if first else None), (int(last) if last else None)


def shown_steps(first: int, end: int) -> str:
    """The ids [first, end) in the notation of --steps.

    >>> shown_steps(9, 20), shown_steps(2, 3)
    ('10:20', '3')
    """
    return f"{number_of(first)}:{end}" if end - first > 1 else f"{number_of(first)}"


def spans(steps: Iterable[int]) -> str:
    """Ids in the notation of --steps.

    >>> spans([0, 1, 2, 7])
    '1:3, 8'
    """
    found: list[list[int]] = []
    for step in sorted(steps):
        if found and found[-1][1] == step:
            found[-1][1] = step + 1
        else:
            found.append([step, step + 1])
    return ", ".join(shown_steps(first, end) for first, end in found)

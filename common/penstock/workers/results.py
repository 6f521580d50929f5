"""What a user's code returned or raised, as plain values that can be packed."""

import math
import os
import traceback
from numbers import Real
from typing import Any

MAX_REASON_CHARS = 300


def as_number(value: Any) -> float | None:
    """A number as a float (bool and NumPy scalars too; infinite if it is too large); None for anything else."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def finite_number(value: Any) -> float:
    """A finite number as a float; ValueError with what was returned instead."""
    number = as_number(value)
    if number is None:
        raise ValueError(f"returned {type(value).__name__}; expected a number")
    if not math.isfinite(number):
        raise ValueError(f"returned {number}; expected a finite number")
    return number


def describe(error: BaseException, caller: str, folder: str = "") -> str:
    """Type, message and place of an exception.

    The place is that of the innermost call in a file below `folder`, or else of the innermost one; none if that is in
    the file `caller`, which called the user's code.
    """
    place = ""
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if folder and each.filename.startswith(folder.rstrip(os.sep) + os.sep)]
    if frames and (last := (own or frames)[-1]).filename != caller:
        place = f" ({os.path.basename(last.filename)}:{last.lineno})"
    return (summary(error) + place).encode("utf-8", "replace").decode()


def summary(error: BaseException) -> str:
    """Type and message of an exception, at most MAX_REASON_CHARS characters of them."""
    try:
        message = str(error)
    except Exception as nested:
        message = f"<its message raises {type(nested).__name__}>"
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if len(text) > MAX_REASON_CHARS:
        text = text[:MAX_REASON_CHARS] + "..."
    return text.encode("utf-8", "replace").decode()

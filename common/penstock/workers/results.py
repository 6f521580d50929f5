"""What a user's code returned or raised, as plain values that can be packed."""

import math
import os
import sysconfig
import traceback
from itertools import dropwhile
from numbers import Real
from typing import Any

MAX_REASON_CHARS = 300
PACKAGES = ("site-packages", "dist-packages")
STANDARD_LIBRARY = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})


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
    """Type and message of an exception, and the line of the user's code that it came from.

    That is the innermost line of a file below `folder` that is no installed package's; else of the user's code wherever
    it is: what the package of the file `caller` called. If a library raised the exception, its line follows.
    """
    places = _places(error, caller, folder)
    place = f" ({'; raised at '.join(places)})" if places else ""
    return (summary(error) + place).encode("utf-8", "replace").decode()


def _places(error: BaseException, caller: str, folder: str) -> list[str]:
    """The user's line, and the library's that raised if that is another file's."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<frozen ")]
    callers = (_package(caller), *STANDARD_LIBRARY)  # asyncio and importlib stand between
    frames = list(dropwhile(lambda frame: frame.filename.startswith(callers), frames))
    if not frames:
        return []
    below = folder.rstrip(os.sep) + os.sep if folder else ""
    own = [each for each in frames if below and each.filename.startswith(below) and not _is_installed(each.filename)]
    own = own or [each for each in frames if not _is_installed(each.filename)]
    own = own or [each for each in frames if each.filename == frames[0].filename]  # an installed package's function
    chosen, last = own[-1], frames[-1]
    shown = [_place(chosen, below)]
    return shown if last.filename == chosen.filename else [*shown, _place(last, below)]


def _package(filename: str) -> str:
    """The folder of the package that a file belongs to; the file itself if it belongs to none."""
    package, folder = filename, os.path.dirname(filename)
    while os.path.exists(os.path.join(folder, "__init__.py")):
        package, folder = folder + os.sep, os.path.dirname(folder)
    return package


def _is_installed(filename: str) -> bool:
    """Whether a file is of Python itself or of an installed package, wherever its environment lies."""
    return filename.startswith(STANDARD_LIBRARY) or any(f"{os.sep}{each}{os.sep}" in filename for each in PACKAGES)


def _place(frame: traceback.FrameSummary, below: str) -> str:
    """File and line, the file as a person names it: from the user's folder, or from that of the packages."""
    roots = (*(f"{os.sep}{each}{os.sep}" for each in PACKAGES), *STANDARD_LIBRARY, below)
    name = next((frame.filename.rpartition(root)[2] for root in roots if root and root in frame.filename), "")
    return f"{name or os.path.basename(frame.filename)}:{frame.lineno}"


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

"""A path that is not there: which one was looked at, from which folder, and what lies near it.

For messages alone. Invariant: it reads names of folders, few of them, and never fails.
"""

import difflib
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

MOST_ENTRIES = 2000  # of a folder: a look at names must stay quick
MOST_FOLDERS = 50
MOST_NEAR = 3


def looked_for(path: str) -> str:
    """How `path`, which is not there, was read, and names that are there instead."""
    try:
        here, missing = Path.cwd(), _first_missing(Path(path).absolute())
    except (OSError, ValueError):  # the folder was deleted, or the path holds a zero byte
        return f"looked for {path!r}"
    text = f"looked at {Path(path).absolute()}"
    if not os.path.isabs(path):
        text += f", from {here}, the folder in which the command runs"
    if missing != Path(path).absolute():
        text += f"; there is no {missing}"
    near = list(islice(dict.fromkeys(_near(path, here)), MOST_NEAR))
    return f"{text}; did you mean {' or '.join(map(repr, near))}?" if near else text


def _first_missing(path: Path) -> Path:
    return next((each for each in (*reversed(path.parents), path) if not each.exists()), path)


def _near(path: str, here: Path) -> Iterator[str]:
    """Paths that exist: one of whose names is like that of `path`, or the same path from a folder nearby."""
    full = Path(path).absolute()
    missing = _first_missing(full)
    rest = full.relative_to(missing)
    like = {each.lower(): each for each in _entries(missing.parent)}
    for name in difflib.get_close_matches(missing.name.lower(), like, n=MOST_NEAR, cutoff=0.7):
        if (found := missing.parent / like[name] / rest).exists():
            yield str(found) if os.path.isabs(path) else os.path.relpath(found, here)
    if not os.path.isabs(path):
        below = [each for each in _entries(here) if not each.startswith(".") and (here / each).is_dir()]
        for folder in (*below[:MOST_FOLDERS], os.pardir):
            if (here / folder / path).exists():
                yield os.path.normpath(os.path.join(folder, path))
        if missing != full and (here / full.name).exists():
            yield full.name


def _entries(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(each.name for each in islice(entries, MOST_ENTRIES))
    except OSError:
        return []

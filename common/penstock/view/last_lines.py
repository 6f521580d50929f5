"""Lines of the files that keep their last ones, `dropped.jsonl` and `dead.jsonl`: the newest first.

Nothing is kept: the trainer bounds these files, and replaces each by a shorter one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from penstock.records.lines import decoded
from penstock.view.lines import lines_before

Line = TypeVar("Line", bound=msgspec.Struct)


def newest(path: Path, kind: type[Line], fits: Callable[[Line], bool], limit: int) -> list[Line]:
    """At most `limit` lines that fit."""
    found: list[Line] = []
    for _, data in lines_before(path, None):
        if len(found) == limit:
            break
        try:
            line = decoded(data, kind)
        except (ValueError, msgspec.MsgspecError):  # a file that was cut and written again while this reads
            continue
        if fits(line):
            found.append(line)
    return found

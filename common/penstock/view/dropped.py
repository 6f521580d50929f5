"""Completions of `dropped.jsonl` that fit, the newest first: those without a reward, of groups that no step trains.

Nothing is kept: the trainer bounds the file, and replaces it by a shorter one.
"""

from pathlib import Path

import msgspec

from penstock.records.files import DROPPED_FILE
from penstock.records.lines import decoded
from penstock.records.samples import DroppedLine
from penstock.view.lines import lines_before


def dropped(folder: Path, reason: str, ticket: int | None, limit: int) -> list[DroppedLine]:
    """At most `limit`. reason: why their group was dropped, "": any. ticket: None: of any."""
    found: list[DroppedLine] = []
    for _, data in lines_before(folder / DROPPED_FILE, None):
        if len(found) == limit:
            break
        try:
            line = decoded(data, DroppedLine)
        except (ValueError, msgspec.MsgspecError):  # a file that was cut and written again while this reads
            continue
        if reason in ("", line.dropped) and ticket in (None, line.ticket):
            found.append(line)
    return found

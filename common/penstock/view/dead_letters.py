"""Lines of `dead.jsonl`, the newest first: messages that no service could use.

Nothing is kept: the trainer bounds the file, and replaces it by a shorter one.
"""

from pathlib import Path

import msgspec

from penstock.records.dead_letters import DeadLetterLine
from penstock.records.files import DEAD_FILE
from penstock.records.lines import decoded
from penstock.view.lines import lines_before


def dead_letters(folder: Path, ticket: str | None, limit: int) -> list[DeadLetterLine]:
    """At most `limit`. ticket: as the message says; None: of any."""
    found: list[DeadLetterLine] = []
    for _, data in lines_before(folder / DEAD_FILE, None):
        if len(found) == limit:
            break
        try:
            line = decoded(data, DeadLetterLine)
        except (ValueError, msgspec.MsgspecError):  # a file that was cut and written again while this reads
            continue
        if ticket in (None, line.ticket):
            found.append(line)
    return found

"""Completions of `samples.jsonl` that fit: by text, reward, failure, length. The newest first.

Invariant: an answer reads at most `MOST_BYTES` of the file, however large it is and however little fits; it says where
the next one goes on. Nothing is kept.
"""

from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel

from penstock.records.files import COMPLETIONS_FILE
from penstock.records.lines import decoded
from penstock.records.samples import SampleLine
from penstock.view.lines import lines_before

MOST_BYTES = 2**25  # 32 MiB, about a tenth of a second


class Wanted(BaseModel, frozen=True):
    """What fits. text: in prompt, completion, answer or failure, in any case of letters. None: any."""

    text: str = ""
    reward_min: float | None = None
    reward_max: float | None = None
    length_min: int | None = None
    length_max: int | None = None
    failed: bool | None = None
    truncated: bool | None = None
    step_min: int | None = None
    step_max: int | None = None

    def fits(self, line: SampleLine) -> bool:
        """Whether a completion does; one without a reward fits no bound of rewards."""
        needle = self.text.casefold()
        return (
            _within(line.reward, self.reward_min, self.reward_max)
            and _within(line.num_tokens, self.length_min, self.length_max)
            and _within(line.step, self.step_min, self.step_max)
            and self.failed in (None, line.reward is None)
            and self.truncated in (None, line.truncated)
            and (not needle or any(needle in text.casefold() for text in _texts(line)))
        )


def search(folder: Path, wanted: Wanted, end: int | None, limit: int) -> dict[str, Any]:
    """Completions before byte `end` of the file (None: its end). next: where to go on; None: there is no more."""
    found: list[SampleLine] = []
    first: int | None = None
    num_lines = 0
    for start, data in lines_before(folder / COMPLETIONS_FILE, end):
        first = start if first is None else first
        try:
            line = decoded(data, SampleLine)
        except (ValueError, msgspec.MsgspecError):  # a file that was cut and written again while this reads
            continue
        num_lines += 1
        if wanted.fits(line):
            found.append(line)
        if start and (len(found) >= limit or first - start >= MOST_BYTES):
            return {"lines": found, "num_read": num_lines, "next": start}
    return {"lines": found, "num_read": num_lines, "next": None}


def _within(value: float | None, lowest: float | None, highest: float | None) -> bool:
    if lowest is None and highest is None:
        return True
    return value is not None and (lowest is None or value >= lowest) and (highest is None or value <= highest)


def _texts(line: SampleLine) -> tuple[str, ...]:
    return line.prompt, line.completion, line.answer, line.failure

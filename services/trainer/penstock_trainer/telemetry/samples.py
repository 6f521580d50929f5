"""`samples.jsonl` in the run's folder: completions of training, some of each step, for people to read.

Owns the file. Invariant: steps are in order, and the lines of a step are written once, together, before its line in
`steps.jsonl`. A trainer that dies in between leaves lines of a step that is reported again: `forget_from` removes them.
Memory holds the place of each step's lines, not the lines.
"""

import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import msgspec

from penstock.durable import writing
from penstock.records.files import COMPLETIONS_FILE
from penstock.records.lines import complete_lines, cut_unfinished_line, decoded
from penstock.records.samples import SampleLine

_encoder = msgspec.json.Encoder()


class _StepNumber(msgspec.Struct, frozen=True):
    step: int


class SampleFile:
    """The samples of a run, earlier lives of its trainer included."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / COMPLETIONS_FILE
        self._steps = array("q")  # in ascending order
        self._starts = array("q")  # the offset of the step's first line
        self._end = 0
        self._lock = threading.Lock()
        cut_unfinished_line(self._path)
        for line in complete_lines(self._path):
            self._note(decoded(line, _StepNumber).step, len(line))

    def _note(self, step: int, num_bytes: int) -> None:
        if not self._steps or self._steps[-1] != step:
            self._steps.append(step)
            self._starts.append(self._end)
        self._end += num_bytes

    def add(self, step: int, lines: Sequence[SampleLine]) -> None:
        """Write the lines of a step, unless they or those of a later step are written."""
        if not lines or (self._steps and step <= self._steps[-1]):
            return
        data = b"".join(_encoder.encode(line) + b"\n" for line in lines)
        with self._lock, writing(str(self._path)):
            with self._path.open("ab") as file:
                file.write(data)
            self._note(step, len(data))

    def of(self, step: int) -> list[SampleLine]:
        """The lines of a step, from the file; none if it has none. For any thread."""
        with self._lock:
            place = bisect_left(self._steps, step)
            if place == len(self._steps) or self._steps[place] != step:
                return []
            start, *rest = self._starts[place : place + 2]
            with self._path.open("rb") as file:
                file.seek(start)
                data = file.read((rest[0] if rest else self._end) - start)
        return [decoded(line, SampleLine) for line in data.splitlines()]

    def forget_from(self, num_steps: int) -> None:
        """Remove the lines of this step and of later ones: they are reported anew."""
        with self._lock, writing(str(self._path)):
            place = bisect_left(self._steps, num_steps)
            if place == len(self._steps):
                return
            self._end = self._starts[place]
            del self._steps[place:], self._starts[place:]
            with self._path.open("rb+") as file:
                file.truncate(self._end)

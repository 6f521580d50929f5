"""The steps of a run as columns: what curves and tables ask of `steps.jsonl`, without reading it again.

Owns the columns' names, which are those of curves in trackers: `reward_mean`, `statistics/loss`, `seconds/step`.
Invariant: 8 bytes for each number of a step; lists and texts of a line are read from the file when asked for.
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock.errors import DataError
from penstock.records.files import STEPS_FILE
from penstock.records.lines import as_written
from penstock.view.curves import Curve, curve
from penstock.view.lines import LineIndex

STEP = "step"


class StepTable:
    """The lines of a run's steps, one row each, in their order."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STEPS_FILE
        self._lines = LineIndex(self._path)
        self._columns: dict[str, array[float]] = {}

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def names(self) -> list[str]:
        """Of all columns."""
        return sorted(self._columns)

    def refresh(self) -> None:
        """Read what was appended. DataError if a line is broken."""
        replaced, lines = self._lines.new_lines()
        if replaced or not len(self._lines):
            self._columns = {}
        for row, line in enumerate(lines, start=len(self._lines)):
            try:
                self._add(row, as_written(line))
            except (ValueError, msgspec.MsgspecError) as error:
                self._lines.forget()
                raise DataError(f"{self._path}, line {row + 1} ({error}): expected lines of the trainer") from None

    def _add(self, row: int, line: Mapping[str, Any]) -> None:
        """The numbers of a line; a column that a line before lacked has nan there."""
        for name, value in _numbers(line):
            column = self._columns.get(name)
            if column is None:
                column = self._columns[name] = array("d")
            if len(column) < row:
                column.extend([math.nan] * (row - len(column)))
            column.append(value)

    def curve(self, name: str, most: int, first: int, last: int | None) -> Curve:
        """A column over the steps [first, last); empty if there is none of this name."""
        steps, values = self._columns.get(STEP), self._columns.get(name)
        if steps is None or values is None:
            return Curve([], [], [], [])
        start = bisect_left(steps, first)
        end = len(values) if last is None else min(bisect_left(steps, last), len(values))
        return curve(steps[start:end], values[start:end], most)

    def value(self, name: str, row: int) -> float | None:
        """A cell; None if the line has no such number."""
        column = self._columns.get(name)
        if column is None or not -len(column) <= row < len(column) or not math.isfinite(column[row]):
            return None
        return column[row]

    def row_of(self, step: int) -> int | None:
        """The row of a step; None if it was not reported yet."""
        steps = self._columns.get(STEP, array("d"))
        row = bisect_left(steps, step)
        return row if row < len(steps) and steps[row] == step else None

    def line(self, row: int) -> dict[str, Any]:
        """All that a row's line holds; empty if the file was replaced meanwhile."""
        data = self._lines.read(row)
        try:
            return as_written(data)
        except (ValueError, msgspec.MsgspecError):
            return {}


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """All but those of histograms. Without recursion: ten thousand lines have half a million of them."""
    for name, value in line.items():
        if type(value) is float or type(value) is int:
            yield name, value
        elif type(value) is dict and name != "histograms":
            for within, each in value.items():
                if type(each) is float or type(each) is int:
                    yield f"{name}/{within}", each
                elif type(each) is dict:  # the figures of a reward function
                    yield from _numbers({f"{name}/{within}/{last}": figure for last, figure in each.items()})

"""One line for each step: the columns of the lines that stay above the live view and in plain output.

Invariant: no line is wider than asked; columns that find no room are left out, the least important first. Pure.
"""

from collections.abc import Callable
from dataclasses import dataclass

from penstock.contracts.status import StepFigures, TrainerStatus
from penstock_launch.watch.figures import UNKNOWN, duration, loss_of, measure, number

MAX_WIDTH = 120
ROWS_BELOW_TITLES = 20  # so that a screen of 24 rows nearly always has titles


@dataclass(frozen=True)
class StepLine:
    """What one line shows."""

    step: StepFigures
    total_steps: int | None
    seconds_left: float | None


@dataclass(frozen=True)
class Column:
    """importance: columns with less go first."""

    title: str
    width: int
    importance: int
    value: Callable[[StepLine], str]


def columns(status: TrainerStatus) -> list[Column]:
    """Of the steps of a run: how wide the first one is depends on its number of steps."""
    digits = len(str(status.total_steps or status.step))
    kl = {"teacher": "KL tea", "reference": "KL ref", "behaviour": "KL beh"}.get(status.kl_of, "KL")
    return [
        Column("step", len("step /") + 2 * digits, 9, _number),
        Column("reward", 7, 9, lambda line: number(line.step.reward, 3)),
        Column("loss", 8, 6, lambda line: loss_of(line.step)),
        Column(kl, 7, 4, lambda line: measure(line.step.kl)),
        Column("entropy", 7, 2, lambda line: number(line.step.entropy, 3)),
        Column("length", 7, 3, lambda line: number(line.step.length, 1)),
        Column(
            "stale", 5, 1, lambda line: UNKNOWN if line.step.staleness_max is None else f"{line.step.staleness_max}"
        ),
        Column("s/step", 6, 5, lambda line: measure(line.step.seconds, 1)),
        Column("left", 8, 7, lambda line: duration(line.seconds_left)),
    ]


class StepTable:
    """The lines of steps, with a line of titles above them now and then."""

    def __init__(self) -> None:
        self._rows_left = 0
        self._titles = ""

    def lines(self, status: TrainerStatus, line: StepLine, width: int) -> list[str]:
        """The line of one step, below the titles if it needs them."""
        shown, gap = fitting(columns(status), width)
        titles = gap.join(f"{column.title:>{column.width}}" for column in shown)
        row = gap.join(f"{column.value(line):>{column.width}}" for column in shown)
        self._rows_left -= 1
        if titles == self._titles and self._rows_left > 0:
            return [row]
        self._titles, self._rows_left = titles, ROWS_BELOW_TITLES
        return [titles, row]


def fitting(wanted: list[Column], width: int) -> tuple[list[Column], str]:
    """The columns that there is room for, and what is between them."""
    shown = list(wanted)
    for gap in ("  ", " "):
        if sum(column.width + len(gap) for column in shown) - len(gap) <= width:
            return shown, gap
    while len(shown) > 1 and sum(column.width + 1 for column in shown) - 1 > width:
        shown.remove(min(shown, key=lambda column: column.importance))
    return shown, " "


def _number(line: StepLine) -> str:
    total = f"/{line.total_steps}" if line.total_steps else ""
    return f"step {line.step.number}{total}"

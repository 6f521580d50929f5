"""What `penstock doctor` found: one line for each thing that it looked at, and the table of them.

Invariant: a warning or a problem says what to do. The table is plain text, for a terminal, a log and a bug report.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from penstock.errors import ConfigError

WIDTH = 108
INDENT = "  "
TO_DO = "-> "


class Verdict(StrEnum):
    """problem: a run cannot work, or not as configured; warning: it works, but worse than it could."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"
    NOT_LOOKED_AT = "not looked at"


@dataclass(frozen=True)
class Line:
    """One thing. seen: what is there, or why it was not looked at. advice: what to do, with the command or key."""

    what: str
    verdict: Verdict
    seen: str
    advice: str = ""

    def __post_init__(self) -> None:
        if self.verdict in (Verdict.WARNING, Verdict.PROBLEM) and not self.advice:
            raise ValueError(f"{self.what} is a {self.verdict} without advice; expected what to do")


@dataclass(frozen=True)
class Group:
    """Lines about one subject."""

    title: str
    lines: Sequence[Line]


def ok(what: str, seen: str) -> Line:
    """Nothing to do."""
    return Line(what, Verdict.OK, seen)


def warning(what: str, seen: str, advice: str) -> Line:
    """It works, but worse than it could."""
    return Line(what, Verdict.WARNING, seen, advice)


def problem(what: str, seen: str, advice: str) -> Line:
    """A run cannot work, or not as configured."""
    return Line(what, Verdict.PROBLEM, seen, advice)


def not_looked_at(what: str, why: str) -> Line:
    """Nothing is known."""
    return Line(what, Verdict.NOT_LOOKED_AT, why)


def amount(num_bytes: float) -> str:
    """A size for people."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes < 100 * 2**30 else f"{num_bytes / 2**30:.0f} GiB"


def render(groups: Sequence[Group]) -> Iterator[str]:
    """The lines of the table, in ASCII if what was seen is, none wider than WIDTH unless one word is."""
    names = max((len(line.what) for group in groups for line in group.lines), default=0)
    for group in groups:
        yield from render_group(group, names)
    yield closing(groups)


def render_group(group: Group, width: int) -> Iterator[str]:
    """Its lines, and an empty one; nothing if it has none. width: of the column of subjects."""
    if not group.lines:
        return
    verdicts = max(map(len, Verdict))
    yield group.title
    for line in group.lines:
        margin = f"{INDENT}{line.verdict:{verdicts}}  {line.what:{width}}  "
        yield from _wrapped(line.seen, margin, " " * len(margin))
        if line.advice:
            yield from _wrapped(line.advice, " " * len(margin) + TO_DO, " " * (len(margin) + len(TO_DO)))
    yield ""


def exit_code(groups: Iterable[Group]) -> int:
    """0 unless there is a problem."""
    return ConfigError.exit_code if any(problems(group.lines) for group in groups) else 0


def problems(lines: Iterable[Line]) -> list[Line]:
    """Those that keep a run from working."""
    return [line for line in lines if line.verdict is Verdict.PROBLEM]


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()) or "-",
        WIDTH,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )


def closing(groups: Iterable[Group]) -> str:
    """The last line: how many there are of each verdict."""
    lines = [line for group in groups for line in group.lines]
    counts = {verdict: sum(line.verdict is verdict for line in lines) for verdict in Verdict}
    wrong, warnings = counts[Verdict.PROBLEM], counts[Verdict.WARNING]
    found = f"{wrong or 'No'} problem{'s' * (wrong > 1)}, {warnings or 'no'} warning{'s' * (warnings > 1)}"
    unseen = counts[Verdict.NOT_LOOKED_AT]
    return f"{found}; {counts[Verdict.OK]} ok{f', {unseen} not looked at' if unseen else ''}."

"""The logs of a run, in whatever form its processes write them, as entries with a time.

    penstock's services    JSON lines with time, level, event and more
    the launcher           2026-11-30T06:37:30Z [   0.0 s] run demo: new, in runs/demo
    engines                [2026-11-30 06:37:46] text, in the host's time
    the queue              27552:M 30 Nov 2026 06:37:30.192 * text, in the host's time

Invariant: every line is in exactly one entry. One without a time, such as those of a traceback, belongs to the entry
before it. A reader never waits, and changes nothing.
"""

import heapq
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

VALUE_CHARACTERS = 120
WORSE_THAN_INFO = ("warning", "error", "critical")
OWN_NAMES = ("time", "level", "service", "run", "event", "traceback", "color_message")  # the others are shown by name

_PLAIN = re.compile(
    r"\[?(?P<iso>\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:[.,]\d+)?Z?)\]? ?"
    r"|\d+:\w (?P<queue>\d\d? \w{3} \d{4} \d\d:\d\d:\d\d\.\d+) "
)
# Of lines without a level: what Python, engines and the launcher write of a fault.
_FAULT = re.compile(
    r"^Traceback |\b(?:ERROR|CRITICAL|FATAL|WARNING)\b|^[\w.]*(?:Error|Exception)\b"
    r"|exit code [1-9]|\bkilled\b|: restart|given up|does not end",
    re.MULTILINE,
)


@dataclass(frozen=True)
class LogEntry:
    """One event of a log. time: Unix seconds. text: all of its lines, as they were written."""

    time: float
    log: str
    text: str

    @property
    def is_fault(self) -> bool:
        """Whether it is a warning or worse, or a fault was written after it."""
        first, _, rest = self.text.partition("\n")
        level = _values(first).get("level")
        return level in WORSE_THAN_INFO or bool(_FAULT.search(rest if level else self.text))

    def shown(self) -> str:
        """Its text for people, without the time; several lines if it has a traceback."""
        first, *rest = self.text.splitlines() or [""]
        values = _values(first)
        if values:
            level = f"{values['level']}: " if values.get("level") in WORSE_THAN_INFO else ""
            more = " ".join(f"{name}={_short(value)}" for name, value in values.items() if name not in OWN_NAMES)
            shown = f"{level}{values.get('event', '')}{f'  ({more})' if more else ''}"
        else:
            stamp = _PLAIN.match(first)
            shown = first[stamp.end() :] if stamp else first
        return "\n".join([shown, *str(values.get("traceback", "")).splitlines(), *rest])


def log_names(folder: Path) -> list[str]:
    """The logs of a run: the names of its services and engines."""
    return sorted(path.stem for path in (folder / "logs").glob("*.log"))


class LogFile:
    """One log, read from where the last read ended."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._path = folder / "logs" / f"{name}.log"
        self._end = 0
        self._time = 0.0

    def new(self) -> Iterator[LogEntry]:
        """The entries since the last call. A last line without its end is not read yet."""
        lines: list[str] = []
        for line in self._complete_lines():
            time = _time_of(line)
            if time is not None and lines:
                yield LogEntry(self._time, self.name, "\n".join(lines))
                lines = []
            # Entries stay in the order of their file: a clock may be set back.
            self._time = max(self._time, time or 0.0)
            lines.append(line)
        if lines:
            yield LogEntry(self._time, self.name, "\n".join(lines))

    def _complete_lines(self) -> Iterator[str]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._end += len(line)
                yield line.decode("utf-8", "replace").rstrip("\r\n")


def merged(logs: Sequence[LogFile]) -> Iterator[LogEntry]:
    """The new entries of several logs, by their time."""
    return heapq.merge(*(log.new() for log in logs), key=lambda entry: entry.time)


def _time_of(line: str) -> float | None:
    """Unix seconds; None if the line has no time."""
    if line.startswith("{"):
        stamp = _values(line).get("time")
        return _iso(stamp) if isinstance(stamp, str) else None
    found = _PLAIN.match(line)
    if found is None:
        return None
    if found["iso"]:
        return _iso(found["iso"].replace(",", "."))
    return datetime.strptime(found["queue"], "%d %b %Y %H:%M:%S.%f").timestamp()


def _iso(stamp: str) -> float | None:
    """A time without a zone is the host's."""
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return None


def _values(line: str) -> dict[str, Any]:
    """The values of a JSON line; empty if it is none."""
    if not line.startswith("{"):
        return {}
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(_rounded(value))
    return text if len(text) <= VALUE_CHARACTERS else f"{text[: VALUE_CHARACTERS - 3]}..."


def _rounded(value: object) -> object:
    """Four digits of each number are enough to read."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value

"""The figures of one part, written as they are found, and the time that the part has.

Owns the file `PART.jsonl`: one JSON object a line, flushed, so that a part that is killed loses nothing. Kinds:

    facts    hardware and versions                  skipped   case, reason: what was not measured, and what it needs
    figure   case, name, value, unit, limit, passed end       state (done, failed, killed), seconds, note

Invariant: the last line of a part that ended is its `end`.
"""

import json
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Recorder:
    """Writes the lines of one part."""

    def __init__(self, folder: Path, part: str, minutes: float) -> None:
        """Starts a new file, and the clock."""
        self.part = part
        self.folder = folder
        self._path = path_of(folder, part)
        self._path.write_text("", encoding="utf-8")
        self._started = time.monotonic()
        self._ends = self._started + 60 * minutes

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def has_time(self, case: str, seconds: float) -> bool:
        """Whether `seconds` are left; if not, notes that the case is skipped."""
        if self.seconds_left >= seconds:
            return True
        self.skip(case, f"it needs about {seconds:.0f} s, and {self.seconds_left:.0f} are left; give --minutes")
        return False

    def facts(self, facts: dict[str, Any]) -> None:
        self._add("facts", facts)

    def figure(
        self, case: str, name: str, value: float, unit: str = "", *, limit: float | None = None, note: str = ""
    ) -> None:
        """One figure. `limit`: the largest value that passes; None: it is not a check."""
        finite = math.isfinite(value)
        passed = None if limit is None else finite and value <= limit
        line = {"case": case, "name": name, "value": value if finite else None, "unit": unit, "note": note}
        self._add("figure", {**line, "limit": limit, "passed": passed})

    def skip(self, case: str, reason: str) -> None:
        self._add("skipped", {"case": case, "reason": reason})

    @contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """A case whose error counts as a check that failed, and does not end the others."""
        try:
            yield
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            failed = {"case": case, "name": "error", "value": None, "unit": "", "note": note}
            self._add("figure", {**failed, "limit": 0, "passed": False})

    def end(self, state: str, note: str = "") -> None:
        self._add("end", {"state": state, "seconds": time.monotonic() - self._started, "note": note})

    def _add(self, kind: str, line: dict[str, Any]) -> None:
        append(self._path, {"part": self.part, "kind": kind, **line})


def path_of(folder: Path, part: str) -> Path:
    return folder / f"{part}.jsonl"


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line, and show it."""
    text = json.dumps(line)
    with path.open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text, flush=True)


def lines_of(folder: Path, part: str) -> list[dict[str, Any]]:
    """The lines of a part; none if it has not run. A last line that was cut off is left out."""
    return list(_parsed(path_of(folder, part)))


def _parsed(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return

"""One completion of the run for the live view, and why a group was dropped, from the files in the run's folder.

They do not come from the trainer's status, which everybody may read. Invariant: a file that is missing, or whose last
line is not complete yet, changes nothing; however large a file is, only its end is read.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from penstock.readable import differing
from penstock.records.files import COMPLETIONS_FILE, DROPPED_FILE, EVALUATIONS_FILE

FILES = (EVALUATIONS_FILE, COMPLETIONS_FILE)  # of held-out prompts, and of training
TAIL_BYTES = 1 << 20  # some lines of either: that of an evaluation may hold a hundred rows whose reward failed
OTHER_PROMPTS = 8  # with which a prompt is compared: enough to see what all have in common


class Sample(msgspec.Struct, frozen=True):
    """A prompt, what the policy made of it, and its reward; None if that failed. asked: what differs of the prompt."""

    prompt: str
    completion: str
    reward: float | None
    asked: str = ""


class _Line(msgspec.Struct, frozen=True):
    """Of any of the files: an evaluation with samples, or one completion. failure: why it has no reward."""

    prompt: str = ""
    completion: str = ""
    reward: float | None = None
    failure: str = ""
    samples: tuple[Sample, ...] = ()

    @property
    def all_samples(self) -> tuple[Sample, ...]:
        return (Sample(self.prompt, self.completion, self.reward),) if self.prompt else self.samples


@dataclass
class NewestSample:
    """The last completion of training, or the first one of an evaluation, whichever was written last."""

    folder: Path
    why_dropped: str = ""
    _read: dict[str, int] = field(default_factory=dict)
    _sample: Sample | None = None
    _prompts: deque[str] = field(default_factory=lambda: deque(maxlen=OTHER_PROMPTS))

    def read(self) -> Sample | None:
        """Look at what the files have gained since the last call."""
        for line in self._new_lines(DROPPED_FILE):
            self.why_dropped = line.failure or self.why_dropped
        for name in FILES:
            newest = self._sample
            for line in self._new_lines(name):
                self._prompts.extend(each.prompt for each in line.all_samples if each.prompt not in self._prompts)
                newest = next(iter(line.all_samples), newest)
            if newest is not None and newest is not self._sample:
                self._sample = msgspec.structs.replace(newest, asked=differing([newest.prompt, *self._prompts])[0])
        return self._sample

    def _new_lines(self, name: str) -> Iterator[_Line]:
        path, before = self.folder / name, self._read.get(name, 0)
        try:
            size = path.stat().st_size
            if size == before:
                return
            begin = max(before if before < size else 0, size - TAIL_BYTES)
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read()
        except OSError:
            return
        complete = data[: data.rfind(b"\n") + 1]
        self._read[name] = begin + len(complete)
        yield from filter(None, map(_decoded, complete.splitlines()))


def _decoded(line: bytes) -> _Line | None:
    """None for a line whose beginning was not read, and for one with a figure that is no JSON."""
    try:
        return msgspec.json.decode(line, type=_Line)
    except msgspec.DecodeError:
        return None

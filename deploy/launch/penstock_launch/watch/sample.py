"""One completion of the run for the live view, from the files in the run's folder.

It does not come from the trainer's status, which everybody may read. Invariant: a file that is missing, or whose last
line is cut off, changes nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec

EVALS_FILE = "evals.jsonl"


class Sample(msgspec.Struct, frozen=True):
    """A prompt, what the policy made of it, and its reward; None if that failed."""

    prompt: str
    completion: str
    reward: float | None

    @property
    def last_line(self) -> str:
        """Of the prompt: the part that differs, and that the completion continues."""
        return next((line for line in reversed(self.prompt.splitlines()) if line.strip()), "")


class _Evaluation(msgspec.Struct, frozen=True):
    samples: tuple[Sample, ...] = ()


@dataclass
class NewestSample:
    """The first completion of the last evaluation in a run's folder."""

    folder: Path
    _size: int = 0
    _sample: Sample | None = None

    def read(self) -> Sample | None:
        """The file is read only if it has grown."""
        path = self.folder / EVALS_FILE
        try:
            size = path.stat().st_size
            if size == self._size:
                return self._sample
            with path.open("rb") as file:
                begin = self._size if self._size < size else 0
                file.seek(begin)
                data = file.read()
        except OSError:
            return self._sample
        complete = data[: data.rfind(b"\n") + 1]
        self._size = begin + len(complete)
        for line in reversed(complete.splitlines()):
            try:
                samples = msgspec.json.decode(line, type=_Evaluation).samples
            except msgspec.DecodeError:  # a figure that is no JSON
                continue
            if samples:
                self._sample = samples[0]
                break
        return self._sample

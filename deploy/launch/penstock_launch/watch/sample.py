"""One completion of the run for the live view, from the files in the run's folder.

It does not come from the trainer's status, which everybody may read. Invariant: a file that is missing, or whose last
line is not complete yet, changes nothing; however large a file is, only its end is read.
"""

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from penstock.readable import last_line
from penstock.records.files import COMPLETIONS_FILE, EVALUATIONS_FILE

FILES = (EVALUATIONS_FILE, COMPLETIONS_FILE)  # of held-out prompts, and of training
TAIL_BYTES = 65536  # some lines of either


class Sample(msgspec.Struct, frozen=True):
    """A prompt, what the policy made of it, and its reward; None if that failed."""

    prompt: str
    completion: str
    reward: float | None

    @property
    def last_line(self) -> str:
        """Of the prompt: the part that differs, and that the completion continues."""
        return last_line(self.prompt)


class _Line(msgspec.Struct, frozen=True):
    """Of either file: an evaluation with samples, or one completion."""

    prompt: str = ""
    completion: str = ""
    reward: float | None = None
    samples: tuple[Sample, ...] = ()

    @property
    def sample(self) -> Sample | None:
        if self.samples:
            return self.samples[0]
        return Sample(self.prompt, self.completion, self.reward) if self.prompt else None


@dataclass
class NewestSample:
    """The last completion of training, or the first one of an evaluation, whichever was written last."""

    folder: Path
    _read: dict[str, int] = field(default_factory=dict)
    _sample: Sample | None = None

    def read(self) -> Sample | None:
        """Look at what the files have gained since the last call."""
        for name in FILES:
            self._sample = self._newest(name) or self._sample
        return self._sample

    def _newest(self, name: str) -> Sample | None:
        path, before = self.folder / name, self._read.get(name, 0)
        try:
            size = path.stat().st_size
            if size == before:
                return None
            begin = max(before if before < size else 0, size - TAIL_BYTES)
            with path.open("rb") as file:
                file.seek(begin)
                data = file.read()
        except OSError:
            return None
        complete = data[: data.rfind(b"\n") + 1]
        self._read[name] = begin + len(complete)
        return next(filter(None, map(_sample_of, reversed(complete.splitlines()))), None)


def _sample_of(line: bytes) -> Sample | None:
    """None for a line whose beginning was not read, and for one with a figure that is no JSON."""
    try:
        return msgspec.json.decode(line, type=_Line).sample
    except msgspec.DecodeError:
        return None

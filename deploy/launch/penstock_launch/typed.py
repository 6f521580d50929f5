"""The command as the user typed it, so that the next one can be shown ready to copy."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "penstock"


@dataclass(frozen=True)
class Typed:
    """program: as a shell takes it, such as `.venv/bin/penstock`. settings: the arguments of the configuration."""

    program: str
    place: str
    settings: tuple[str, ...]

    @classmethod
    def now(cls, place: str, settings: Sequence[str]) -> "Typed":
        """Of this process."""
        return cls(program_of(sys.argv[0]), place, tuple(settings))

    def launch(self, *more: str) -> str:
        """The launch with further settings, a word for each key and value; those that were typed give way."""
        return f"{self.program} launch {self.place} {shlex.join([*self._without(more[::2]), *more])}"

    def command(self, name: str, *words: str) -> str:
        """Another command for the same configuration."""
        return f"{self.program} {name} {shlex.join([*self.settings, *words])}"

    def _without(self, keys: Sequence[str]) -> list[str]:
        words, kept = iter(self.settings), []
        for word in words:
            if word in keys:
                next(words, None)
            elif word.partition("=")[0] not in keys:
                kept.append(word)
        return kept


def program_of(path: str) -> str:
    """The words that start this program again: its name if the shell finds it, else its path."""
    if Path(path).name != PROGRAM:
        return f"{shlex.quote(sys.executable)} -m penstock_launch"
    found = shutil.which(PROGRAM)
    return PROGRAM if found and Path(found).resolve() == Path(path).resolve() else shlex.quote(path)

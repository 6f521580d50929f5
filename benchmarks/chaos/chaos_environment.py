"""The environment of the chaos runs: a few turns whose course depends only on the row and on what the model says.

For some rows it hangs now and then, fails, or lies about its reward. Invariant: an episode ends in the same way
whatever is killed meanwhile. It hangs at most once, since a file remembers that it did.
"""

import math
import time
import zlib
from pathlib import Path
from typing import Any

FAULTS = ("fails", "nan", "text", "none")
"""Of rows whose episodes all fail: reset raises; the reward is not a number, is a text, or is missing."""
ENDING_LETTERS = frozenset("xyz")  # about half of the turns have one
HANG_SECONDS = 3600.0  # longer than any deadline
HANG_SHARE, LIE_SHARE = 3, 4  # one of so many episodes, of the rows that do so


class EarlyLetters:
    """Say letters before `n`; each turn shows how many there were."""

    def reset(self, prompt: str, fault: str, folder: str, **row: Any) -> str:
        if fault == "fails":
            raise ConnectionError("the sandbox is away")
        self._prompt, self._fault, self._folder = prompt, fault, Path(folder)
        self._said: list[str] = []
        return "a="

    def step(self, text: str) -> Any:
        """How many early letters there were so far; or the reward. With the fault `text` it has no end."""
        self._said.append(text)
        if self._fault == "hangs" and len(self._said) == 1 and self._is_one_of(HANG_SHARE):
            self._hang_once()
        if ENDING_LETTERS & set(text) and self._fault != "text":
            return self.get_reward()
        return f"{self._num_early % 10}="

    def get_reward(self) -> Any:
        """The share of early letters, or a lie. Asked for by the service if the episode was cut at agent.max_turns."""
        if self._fault == "nan" or (self._fault == "sometimes" and self._is_one_of(LIE_SHARE)):
            return math.nan
        if self._fault in ("text", "none"):
            return "good" if self._fault == "text" else None
        return self._num_early / max(1, sum(map(len, self._said)))

    @property
    def _num_early(self) -> int:
        return sum("a" <= letter < "n" for text in self._said for letter in text)

    @property
    def _name(self) -> int:
        """Of all that has happened in the episode."""
        return zlib.crc32("|".join([self._prompt, *self._said]).encode())

    def _is_one_of(self, number: int) -> bool:
        return self._name % number == 0

    def _hang_once(self) -> None:
        """As a tool hangs; not again after the same words, so that another attempt gets past it."""
        try:
            (self._folder / f"{self._name:08x}").touch(exist_ok=False)
        except FileExistsError:
            return
        time.sleep(HANG_SECONDS)

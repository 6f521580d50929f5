"""An environment: a number from 1 to 7 is to be guessed in three tries, with "higher" and "lower" as answers.

Penstock makes a `Guess` for each episode, in a worker process. `reset` gets the row's columns, `step` each text of the
model; a number ends the episode and is its reward.
"""

import re
from typing import Any

NUM_TRIES = 3


class Guess:
    """Guess 1-7 in three tries."""

    def reset(self, answer: str, **row: Any) -> str:
        """The first text that the model reads, after the row's prompt."""
        self.secret = int(answer)
        self.left = NUM_TRIES
        return "Guess:"

    def step(self, text: str) -> str | float:
        """An observation; or the reward, which ends the episode."""
        self.left -= 1
        number = re.fullmatch(r"\s*(\d{1,9})\s*", text)  # what the model writes must never raise: int() does
        guess = int(number[1]) if number else None
        if guess == self.secret:
            return 1.0
        if self.left == 0:
            return 0.0
        if guess is None:
            return "not a number\nGuess:"
        return "higher\nGuess:" if guess < self.secret else "lower\nGuess:"

"""The environment of the example: the model may ask a calculator before it answers.

Q: 52+39
calc 52+39      <- the model asks
= 91            <- the calculator answers
A: 91           <- the model answers, which ends the episode
"""

import re
from typing import Any

CALL = re.compile(r"calc (\d{1,9})\+(\d{1,9})")


class Calculator:
    """Adds two numbers for the model; its answer is right or wrong."""

    def reset(self, answer: str, **row: Any) -> None:
        """Begin with the row's prompt as it is."""
        self.answer = answer

    def step(self, text: str) -> str | float:
        """The calculator's answer to a call, or the score of any other line. The line's end is no part of `text`."""
        call = CALL.fullmatch(text)
        if call is None:
            return float(text == f"A: {self.answer}")
        return f"= {int(call[1]) + int(call[2])}\n"

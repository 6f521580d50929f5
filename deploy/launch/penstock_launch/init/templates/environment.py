"""What the model answers to: an episode of several turns, and what it is worth.

Penstock makes a `OneWord` for each episode, in a worker process. The row's prompt comes first; then `step` gets each
text of the model. Nothing that the model writes may raise: an exception is a failure of the environment, and then the
episode is tried again.
"""

from difflib import SequenceMatcher
from typing import Any

NUM_TRIES = 2  # agent.max_turns


class OneWord:
    """Two tries at the word that the row asks for."""

    def reset(self, answer: str, **row: Any) -> None:
        """Begins an episode; the keywords are the columns of the row. A text that it returns follows the prompt."""
        self.answer = answer
        self.tries = 0

    def step(self, text: str) -> str | float:
        """A text for the model, which then answers again; or the reward, which ends the episode."""
        self.tries += 1
        if text.strip() == self.answer:
            return 1.0 / self.tries
        if self.tries == NUM_TRIES:
            return 0.3 * SequenceMatcher(None, text.strip(), self.answer).ratio()
        return "No. Answer with that word only."

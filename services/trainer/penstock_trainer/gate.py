"""Where an update waits, its gradient computed and nothing changed, until the weights may change.

Owns one permission. Invariant: `wait` returns only once the gate is open; where it is shut instead, it raises, so that
no thread waits for a step that will not be committed.
"""

import threading
import time

from penstock.errors import PenstockError


class Gate:
    """One update's permission to change weights."""

    def __init__(self) -> None:
        self._decided = threading.Event()
        self._is_open = False
        self.waited_seconds = 0.0
        """For how long the update stood still here."""
        self.is_waited_at = False

    def open(self) -> None:
        """The weights may change."""
        self._is_open = True
        self._decided.set()

    def shut(self) -> None:
        """Nobody will open it any more; without effect once it is open."""
        self._decided.set()

    def wait(self) -> None:
        """Block until the weights may change; PenstockError when they may not."""
        start = time.perf_counter()
        self.is_waited_at = True
        self._decided.wait()
        self.is_waited_at = False
        self.waited_seconds += time.perf_counter() - start
        if not self._is_open:
            raise PenstockError("the step was not committed: its update ends without a change; see the error before it")

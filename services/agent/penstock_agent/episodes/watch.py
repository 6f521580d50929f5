"""Which episodes run, and what each of them waits for.

Owns the words. An episode waits for the model while a call of it runs, else for its environment or agent.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from penstock_agent.generation.waits import Waits

SHOWN_AFTER_SECONDS = 30.0  # a shorter wait is no news


class Watched(Protocol):
    """What shows where an episode is."""

    num_turns: int

    @property
    def waits(self) -> Waits:
        """For answers of the model."""

    @property
    def asked_tools(self) -> tuple[str, ...]:
        """The tools that the model's last answer asked for."""


class Watch:
    """The running episodes of a service."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: dict[int, tuple[str, Watched]] = {}
        self._num_begun = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @contextmanager
    def over(self, name: str, episode: Watched) -> Iterator[None]:
        """An episode runs while the block does. name: its ticket and index."""
        self._num_begun += 1
        number = self._num_begun
        self._running[number] = (name, episode)
        try:
            yield
        finally:
            del self._running[number]

    def longest_wait(self) -> str:
        """The episode that has waited longest, and for what; empty if no wait is long.

        >>> from types import SimpleNamespace
        >>> watch = Watch(clock=lambda: 131.0)
        >>> session = SimpleNamespace(num_turns=4, waits=Waits(clock=lambda: 100.0), asked_tools=("add",))
        >>> with watch.over("12/3", session):
        ...     watch.longest_wait()
        'episode 12/3, turn 4, has waited 31 s for tool add'
        """
        longest = min(self._running.values(), key=lambda each: each[1].waits.since, default=None)
        if longest is None:
            return ""
        name, episode = longest
        seconds = self._clock() - episode.waits.since
        if seconds < SHOWN_AFTER_SECONDS:
            return ""
        return f"episode {name}, turn {episode.num_turns}, has waited {seconds:.0f} s for {_what(episode)}"


def _what(episode: Watched) -> str:
    if episode.waits.num_waiting:
        return "the model"
    if not episode.asked_tools:
        return "its environment"
    return f"tool{'s' if len(episode.asked_tools) > 1 else ''} {', '.join(episode.asked_tools)}"

"""The user's view of a live run: a picture that is redrawn below the lines that stay, or only the lines.

    event, doing, show ---> [ lock ] ---> terminal: LiveView    lines scroll above the picture (`frame`)
    a thread, twice a second --^     ---> pipe:     PlainView   lines, and a reminder when none came for a while
                                     ---> launcher.log: PlainView, always

Invariant: a view only shows. The launcher's log always gets the lines, so that none that scrolled away is lost. Nothing
that takes long is silent: the thread shows that time passes, also while the launcher itself is blocked.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from rich.console import Console, ConsoleDimensions, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from penstock.runtime.output import complain
from penstock_launch.watch.follow import RunSnapshot
from penstock_launch.watch.frame import Screen, frame
from penstock_launch.watch.news import News, waits_for
from penstock_launch.watch.step_table import MAX_WIDTH

TICK_SECONDS = 0.5
REMIND_AFTER_SECONDS = 4.0  # silence of 5 s looks like a hang; a tick may be late
REMIND_LOG_AFTER_SECONDS = 60.0  # nobody waits in front of a log
LONGEST_SILENCE_SECONDS = 120.0
JOIN_SECONDS = 2.0  # a terminal that takes no output may hold the thread
STAMP_WIDTH = len("[1234.5 s] ")


class View(Protocol):
    """A way to show a run."""

    def event(self, text: str) -> None:
        """Show an event."""

    def doing(self, text: str) -> None:
        """Set what the launcher itself does, until the next call of `show`."""

    def show(self, snapshot: RunSnapshot) -> None:
        """Show the present state."""

    def tick(self) -> None:
        """Show that time passes. From another thread, never at the same time as another call."""

    def close(self) -> None:
        """End the view; later output is printed below it."""


class Views:
    """Several views of one run, and the thread that ticks them."""

    def __init__(self, *views: View) -> None:
        self._views = views
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._tick_on, name="view", daemon=True)
        self._thread.start()

    def event(self, text: str) -> None:
        self._each(lambda view: view.event(text))

    def doing(self, text: str) -> None:
        self._each(lambda view: view.doing(text))

    def show(self, snapshot: RunSnapshot) -> None:
        self._each(lambda view: view.show(snapshot))

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)
        self._each(lambda view: view.close())

    def tick(self) -> None:
        self._each(lambda view: view.tick())

    def _tick_on(self) -> None:
        while not self._closed.wait(TICK_SECONDS):
            self.tick()

    def _each(self, call: Callable[[View], None]) -> None:
        with self._lock:
            for view in self._views:
                call(view)


class TerminalConsole(Console):
    """A console of the size that its terminal has now.

    COLUMNS and LINES, which some shells and tools export, are of the moment when they were set.
    """

    @property
    def size(self) -> ConsoleDimensions:
        try:
            columns, lines = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError):  # no terminal
            return super().size
        return ConsoleDimensions(columns, lines) if columns and lines else super().size

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        raise AttributeError("the terminal has its own size")


def make_view(run: str, write_log: Callable[[str], None]) -> Views:
    """The view that fits standard output, and always plain lines for the launcher's log."""
    console = TerminalConsole(highlight=False)
    live = sys.stdout.isatty() and not console.is_dumb_terminal
    shown: View = LiveView(run, console) if live else PlainView(lambda line: print(line, flush=True))
    return Views(PlainView(write_log, remind_after_seconds=REMIND_LOG_AFTER_SECONDS), GuardedView(shown))


class GuardedView:
    """A view whose terminal or pipe may close: the run continues, and its log holds the events."""

    def __init__(self, view: View) -> None:
        self._view: View | None = view

    def event(self, text: str) -> None:
        self._try(lambda view: view.event(text))

    def doing(self, text: str) -> None:
        self._try(lambda view: view.doing(text))

    def show(self, snapshot: RunSnapshot) -> None:
        self._try(lambda view: view.show(snapshot))

    def tick(self) -> None:
        self._try(lambda view: view.tick())

    def close(self) -> None:
        self._try(lambda view: view.close())

    def _try(self, call: Callable[[View], None]) -> None:
        if self._view is None:
            return
        try:
            call(self._view)
        except OSError:
            self._view = None


class PlainView:
    """One line for each step and each event, with the seconds since the start, and reminders at growing intervals."""

    def __init__(
        self,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        remind_after_seconds: float = REMIND_AFTER_SECONDS,
    ) -> None:
        self._write = write
        self._clock = clock
        self._start = clock()
        self._news = News(clock)
        self._doing = "starting"
        self._snapshot: RunSnapshot | None = None
        self._remind_after = remind_after_seconds
        self._silence = remind_after_seconds
        self._last_line_at = self._start

    def event(self, text: str) -> None:
        self._silence = self._remind_after
        self._line(text)

    def doing(self, text: str) -> None:
        self._doing = text

    def show(self, snapshot: RunSnapshot) -> None:
        self._snapshot, self._doing = snapshot, ""
        for line in self._news.lines(snapshot, MAX_WIDTH - STAMP_WIDTH):
            self.event(line)
        self.tick()

    def tick(self) -> None:
        """Name what is waited for if nothing was said for long; each time after twice the time."""
        if self._clock() - self._last_line_at < self._silence:
            return
        self._silence = min(2 * self._silence, max(self._remind_after, LONGEST_SILENCE_SECONDS))
        doing = self._doing or (waits_for(self._snapshot) if self._snapshot else "starting")
        self._line(f"still {doing}")

    def close(self) -> None:
        """Nothing is held back."""

    def _line(self, text: str) -> None:
        self._last_line_at = self._clock()
        self._write(f"{stamp(self._last_line_at - self._start)}{text}")


class LiveView:
    """A picture that is redrawn; lines scroll above it."""

    def __init__(self, run: str, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._console = console
        self._clock = clock
        self._start = clock()
        self._news = News(clock, starts=False)
        self._doing = "starting"
        self._snapshot: RunSnapshot | None = None
        self._width = console.width
        self._lines: list[Text] = []
        self._live = Live(
            get_renderable=self._picture,
            console=console,
            auto_refresh=False,
            transient=True,  # what stays are the lines, and the report that follows
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start(refresh=True)

    def event(self, text: str) -> None:
        self._adapt()
        self._console.print(Text(self._shown(f"{stamp(self._clock() - self._start)}{text}")))

    def doing(self, text: str) -> None:
        self._doing = text
        self.tick()

    def show(self, snapshot: RunSnapshot) -> None:
        self._snapshot, self._doing = snapshot, ""
        for line in self._news.lines(snapshot, min(self._console.width, MAX_WIDTH) - STAMP_WIDTH):
            self.event(line)
        self.tick()

    def tick(self) -> None:
        self._adapt()
        self._live.refresh()

    def close(self) -> None:
        self._adapt()
        self._live.stop()

    def _picture(self) -> Group:
        width, height = self._console.size
        screen = Screen(width, height, blocks=self._is_unicode)
        self._lines = frame(self._run, self._snapshot, self._doing, self._clock() - self._start, screen)
        for line in self._lines:
            line.plain = self._shown(line.plain)
        return Group(*self._lines)

    def _adapt(self) -> None:
        """After the terminal became narrower: it has wrapped long lines of the picture, whose rows are erased here.

        The library counts the rows as it drew them. Terminals that cut lines off instead lose as many rows above.
        """
        before, self._width = self._width, self._console.width
        if self._width >= before:
            return
        more = sum(max(0, line.cell_len - 1) // self._width for line in self._lines)
        for _ in range(more):
            self._console.control(Control((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)))
        self._live.refresh()

    @property
    def _is_unicode(self) -> bool:
        return self._console.encoding.lower().startswith("utf")

    def _shown(self, text: str) -> str:
        """What the terminal's encoding lacks would be an error."""
        if self._is_unicode:
            return text.encode("utf-8", "replace").decode()
        return text.encode(self._console.encoding, "replace").decode(self._console.encoding)


@contextlib.contextmanager
def named_if_slow(what: str, seconds: float = REMIND_AFTER_SECONDS / 2) -> Iterator[None]:
    """Name on standard error what a command does before it has a view, once that takes long."""
    timer = threading.Timer(seconds, complain, [f"penstock: {what}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def stamp(seconds: float) -> str:
    """The time since the start of a launch, before each line."""
    return f"[{seconds:6.1f} s] "

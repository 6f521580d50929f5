"""The user's view of a live run: one table on a terminal, plain lines elsewhere.

Invariant: a view only shows. The launcher's log always gets the plain lines, so that no line that scrolled away is
lost.
"""

import sys
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from penstock_launch.supervise.child import ChildState
from penstock_launch.watch.figures import duration, figures, number, step_line
from penstock_launch.watch.follow import RunSnapshot, ServiceView

REMIND_AFTER_SECONDS = 15.0  # a newcomer wonders about silence after about this long
TROUBLE_SECONDS = 60.0  # between two lines about what keeps a service from its work: it may come and go
REFRESHES_PER_SECOND = 2.0
STATE_STYLES = {
    ChildState.READY: "green",
    ChildState.STARTING: "yellow",
    ChildState.WAITING: "red",
    ChildState.ENDED: "dim",
}


class View(Protocol):
    """A way to show a run."""

    def event(self, text: str) -> None:
        """Show an event."""

    def show(self, snapshot: RunSnapshot) -> None:
        """Show the present state."""

    def close(self) -> None:
        """End the view; later output is printed below it."""


class Views:
    """Several views of one run."""

    def __init__(self, *views: View) -> None:
        self._views = views

    def event(self, text: str) -> None:
        for view in self._views:
            view.event(text)

    def show(self, snapshot: RunSnapshot) -> None:
        for view in self._views:
            view.show(snapshot)

    def close(self) -> None:
        for view in self._views:
            view.close()


def make_view(run: str, write_log: Callable[[str], None]) -> View:
    """The view that fits standard output, and always plain lines for the launcher's log."""
    shown: View = LiveView(run) if sys.stdout.isatty() else PlainView(lambda line: print(line, flush=True))
    return Views(PlainView(write_log), GuardedView(shown))


class GuardedView:
    """A view whose terminal or pipe may close: the run continues, and its log holds the events."""

    def __init__(self, view: View) -> None:
        self._view: View | None = view

    def event(self, text: str) -> None:
        self._try(lambda view: view.event(text))

    def show(self, snapshot: RunSnapshot) -> None:
        self._try(lambda view: view.show(snapshot))

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
    """One line for each step and each event, with the seconds since the start."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._start = clock()
        self._step = 0
        self._accuracy: float | None = None
        self._shown: dict[str, tuple[str, str]] = {}
        self._troubled: set[str] = set()
        self._next_trouble_at: dict[str, float] = {}
        self._reminded_at = self._start
        self._waiting_for: str | None = None

    def event(self, text: str) -> None:
        self._write(f"[{self._clock() - self._start:6.1f} s] {text}")

    def show(self, snapshot: RunSnapshot) -> None:
        for service in snapshot.services:
            self._show_service(service)
            self._show_trouble(service)
        self._show_status(snapshot)
        self._remind(snapshot)

    def close(self) -> None:
        """Nothing is held back."""

    def _show_service(self, service: ServiceView) -> None:
        now = (service.state, service.detail)
        if self._shown.get(service.name) == now:
            return
        self._shown[service.name] = now
        if service.state == ChildState.READY:
            self.event(
                f"{service.name}: ready after {service.seconds:.0f} s{f', {service.url}' if service.url else ''}"
            )
        elif service.state == ChildState.STARTING:
            self.event(f"{service.name}: starting: {service.detail}")

    def _show_trouble(self, service: ServiceView) -> None:
        now = self._clock()
        if not service.trouble:
            if service.name in self._troubled:
                self._troubled.remove(service.name)
                self.event(f"{service.name}: goes on")
        elif now >= self._next_trouble_at.get(service.name, now):
            self._next_trouble_at[service.name] = now + TROUBLE_SECONDS
            self._troubled.add(service.name)
            self.event(f"{service.name}: {service.trouble}")

    def _show_status(self, snapshot: RunSnapshot) -> None:
        status = snapshot.status
        if status is None:
            return
        if status.heldout_accuracy is not None and status.heldout_accuracy != self._accuracy:
            self._accuracy = status.heldout_accuracy
            self.event(f"evaluation: held-out accuracy {number(status.heldout_accuracy)}")
        if status.step != self._step:
            self._step = status.step
            self.event(step_line(status))

    def _remind(self, snapshot: RunSnapshot) -> None:
        """Name the pending services when they change, and again after some time."""
        now = self._clock()
        waiting_for = snapshot.status.waiting_for if snapshot.status else None
        if waiting_for and waiting_for != self._waiting_for and not self._step:
            self.event(f"trainer: waiting for {waiting_for}")
            self._reminded_at = now
        self._waiting_for = waiting_for
        starting = [service for service in snapshot.services if service.state == ChildState.STARTING]
        if starting and now - self._reminded_at >= REMIND_AFTER_SECONDS:
            self._reminded_at = now
            shown = "; ".join(f"{service.name}: {service.detail} ({service.seconds:.0f} s)" for service in starting)
            self.event(f"still starting: {shown}")


class LiveView:
    """One table that is redrawn; events scroll above it."""

    def __init__(self, run: str, console: Console | None = None) -> None:
        self._run = run
        self._start = time.monotonic()
        self._live = Live(
            Text(f"penstock: {run} is starting"),
            console=console or Console(),
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def event(self, text: str) -> None:
        self._live.console.print(Text(f"[{time.monotonic() - self._start:6.1f} s] {text}", style="dim"))

    def show(self, snapshot: RunSnapshot) -> None:
        self._live.update(render(self._run, snapshot, time.monotonic() - self._start))

    def close(self) -> None:
        self._live.stop()


def render(run: str, snapshot: RunSnapshot, seconds: float) -> RenderableType:
    """The table of the live view."""
    status = snapshot.status
    phase = status.phase if status else "starting"
    title = f"penstock  {run}  {phase}  {duration(seconds)}"
    if status and status.waiting_for:
        title += f"  waiting for {status.waiting_for}"
    parts: list[RenderableType] = [Text(title, style="bold")]
    if status is not None:
        training = Table.grid(padding=(0, 2))
        for name, value in figures(status):
            training.add_row(Text(name, style="dim"), Text(value))
        parts.append(training)
    services = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("service", "state", "restarts", "detail"):
        services.add_column(column)
    for service in snapshot.services:
        style = STATE_STYLES[ChildState(service.state)]
        detail = service.trouble or service.detail or service.url
        services.add_row(service.name, Text(service.state, style=style), str(service.restarts), Text(detail))
    return Group(*parts, services)

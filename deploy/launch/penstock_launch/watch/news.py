"""What is new since the last look at a run, as lines that stay: steps, evaluations, services, the phases of the end.

Owns what was said already. Invariant: every step that a status still holds has one line, however rarely it is looked
at; steps of an earlier launch have none. An evaluation has a line of its own, which names the steps before it: it ends
during a later step, whose line is no place for it.
"""

import time
from collections.abc import Callable, Iterator

from penstock.contracts.status import StepFigures, TrainerStatus
from penstock.readable import harmless
from penstock_launch.supervise.child import ChildState
from penstock_launch.supervise.supervisor import ENDING
from penstock_launch.watch.figures import FAULTS, dropped_words, held_out_sets, heldout_words
from penstock_launch.watch.follow import RunSnapshot, ServiceView
from penstock_launch.watch.step_table import StepLine, StepTable

LONGEST_WAIT = 90  # characters: a reminder is one line
TROUBLE_SECONDS = 60.0  # between two lines about what keeps a service from its work: it may come and go


class News:
    """Lines that a view keeps. `starts`: also each stage of a service's start, which a live view shows anyway."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, starts: bool = True) -> None:
        self._clock = clock
        self._starts = starts
        self._table = StepTable()
        self._said_step: int | None = None
        self._said_heldout: dict[str, int | None] = {}
        self._said_faults: int | None = None
        self._next_faults_at = 0.0
        self._phase = ""
        self._waiting_for: str | None = None
        self._states: dict[str, tuple[str, str]] = {}
        self._troubled: set[str] = set()
        self._open_breakers: dict[str, set[str]] = {}
        self._next_trouble_at: dict[str, float] = {}

    def lines(self, snapshot: RunSnapshot, width: int) -> Iterator[str]:
        """The lines of what has changed; `width`: of a line of a step."""
        for service in snapshot.services:
            yield from self._service(service)
            yield from self._breakers(service)
            yield from self._trouble(service)
        if snapshot.status is not None and snapshot.answers:
            yield from self._steps(snapshot.status, width)
            yield from self._evaluation(snapshot.status)
            yield from self._dropped(snapshot.status, snapshot.why_dropped)
            yield from self._trainer(snapshot.status)

    def _service(self, service: ServiceView) -> Iterator[str]:
        now = (service.state, service.detail)
        if self._states.get(service.name) == now:
            return
        self._states[service.name] = now
        if service.state == ChildState.READY:
            url = f", {service.url}" if service.url else ""
            yield f"{service.name}: ready after {service.seconds:.0f} s{url}"
        elif service.state == ChildState.STARTING and self._starts:
            yield f"{service.name}: starting: {service.detail}"

    def _breakers(self, service: ServiceView) -> Iterator[str]:
        """Each opening and each closing, at once; those of a service that ended are forgotten."""
        before, now = self._open_breakers.get(service.name, set()), set(service.open_breakers)
        self._open_breakers[service.name] = now
        for function, why in service.open_breakers.items():
            if function not in before:
                self._troubled.add(service.name)
                self._next_trouble_at[service.name] = self._clock() + TROUBLE_SECONDS
                yield f"{service.name}: the breaker of {function} opens, its groups are parked: {harmless(why)}"
        if service.state == ChildState.READY:
            for function in sorted(before - now):
                yield f"{service.name}: the breaker of {function} closes"

    def _trouble(self, service: ServiceView) -> Iterator[str]:
        now = self._clock()
        if not service.trouble:
            if service.name in self._troubled:
                self._troubled.remove(service.name)
                yield f"{service.name}: goes on"
        elif now >= self._next_trouble_at.get(service.name, now):
            self._next_trouble_at[service.name] = now + TROUBLE_SECONDS
            self._troubled.add(service.name)
            yield f"{service.name}: {service.trouble}"

    def _steps(self, status: TrainerStatus, width: int) -> Iterator[str]:
        if status.first_step is None:  # the trainer has not resumed
            return
        if self._said_step is None:
            self._said_step = status.first_step
            if status.first_step > 0:  # its last evaluation was said by an earlier launch
                self._said_heldout = {name: each.steps for name, each in held_out_sets(status).items()}
        if status.step < self._said_step:  # the queue lost the end of the ledger: these steps are trained again
            self._said_step = status.step
        for step in status.steps:
            if step.number > self._said_step:
                self._said_step = step.number
                line = StepLine(step, status.total_steps, _seconds_left(status, step))
                yield from self._table.lines(status, line, width)

    def _evaluation(self, status: TrainerStatus) -> Iterator[str]:
        """Each evaluation that was not said, of the main set and of others."""
        before, self._said_heldout = self._said_heldout, dict(self._said_heldout)
        for name, each in held_out_sets(status).items():
            self._said_heldout[name] = each.steps
            if status.first_step is not None and each.steps != before.get(name):
                of = f" of {harmless(name)}" if name else ""
                yield f"evaluation{of} after {each.steps} steps: {heldout_words(each)}"

    def _dropped(self, status: TrainerStatus, why: str) -> Iterator[str]:
        """Groups that are dropped since something failed, now and then: each costs its generation."""
        faults = {reason: count for reason, count in status.dropped.items() if reason in FAULTS}
        if status.first_step is None:
            return
        if self._said_faults is None:
            self._said_faults = 0 if status.first_step == 0 else sum(faults.values())
        now = self._clock()
        if sum(faults.values()) > self._said_faults and now >= self._next_faults_at:
            self._said_faults, self._next_faults_at = sum(faults.values()), now + TROUBLE_SECONDS
            yield f"dropped groups so far: {dropped_words(faults)}{f' (the last: {harmless(why)})' if why else ''}"

    def _trainer(self, status: TrainerStatus) -> Iterator[str]:
        if status.phase != self._phase and status.phase.startswith(ENDING):
            yield f"trainer: {status.phase}"
        self._phase = status.phase
        if status.waiting_for and status.waiting_for != self._waiting_for and not self._said_step:
            yield f"trainer: waiting for {status.waiting_for}"
        self._waiting_for = status.waiting_for


def _seconds_left(status: TrainerStatus, step: StepFigures) -> float | None:
    """After this step, which may not be the last one that the trainer did."""
    if status.eta_seconds is None or status.step_seconds is None:
        return None
    return status.eta_seconds + (status.step - step.number) * status.step_seconds


def phase_of(snapshot: RunSnapshot) -> str:
    """What the run does now, by its trainer while that answers, else by its launcher."""
    status = snapshot.status
    if status is not None and snapshot.answers:
        begins = snapshot.ending and not status.phase.startswith(ENDING)
        return f"{ENDING}: {status.phase}" if begins else status.phase
    if snapshot.ending:
        return snapshot.ending
    if status is not None and status.phase.startswith(ENDING):
        return f"{ENDING}: the trainer leaves the run"
    return "starting" if status is None else "the trainer does not answer"


def waits_for(snapshot: RunSnapshot) -> str:
    """What the run waits for, with the names of the services that are not ready."""
    starting = [each for each in snapshot.services if each.state == ChildState.STARTING]
    if starting and not snapshot.ending:
        detailed = "; ".join(f"{each.name}: {each.detail} ({each.seconds:.0f} s)" for each in starting)
        named = ", ".join(f"{each.name} ({each.seconds:.0f} s)" for each in starting)
        return f"starting: {detailed if len(detailed) <= LONGEST_WAIT else named}"
    status, phase = snapshot.status, phase_of(snapshot)
    if status is None or not snapshot.answers or phase.startswith(ENDING):
        return phase
    waiting = f", waiting for {status.waiting_for}" if status.waiting_for else ""
    return f"{phase} (step {status.step + 1}){waiting}"

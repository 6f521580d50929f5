"""One run from start to summary, on any site.

    configuration -> lock, hold the run -> run folder (run.existing) -> queue -> all services at once -> supervise, ...
                                                                                            '-> summary.json, report

The run is held (`penstock.broker.launcher`) before anything is deleted: in a queue of the user's before the folder is
prepared, in the embedded one, whose data the lock protects, when it has started. Processes that an earlier launch left
are ended before GPUs are chosen, since they may still have memory there.

Wires the parts and owns nothing else. A `Site` places the queue and the services: on this host (`local`), on the nodes
of a Ray cluster (`on_ray`) or of a Slurm job (`slurm`).
"""

import asyncio
import contextlib
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from penstock.broker import Queue, connect
from penstock.broker.launcher import HeldRun, hold_run
from penstock.broker.trainer import read_ledger
from penstock.config import Config, RedisSection
from penstock.config.secrets import shown_url
from penstock.contracts.ledger import replay
from penstock.errors import LeaseLostError, PenstockError
from penstock.runtime.output import complain, tell, terminal_width
from penstock.runtime.process import heeded
from penstock.weights.local_folder import free_memory_of_run
from penstock_launch.run_folder import RunFolder
from penstock_launch.supervise.child import Child, Startable
from penstock_launch.supervise.process_trees import ProcessTrees
from penstock_launch.supervise.restarts import RestartPolicy
from penstock_launch.supervise.supervisor import RunOutcome, Supervisor
from penstock_launch.typed import Typed
from penstock_launch.watch.follow import RunFollower, make_client
from penstock_launch.watch.next_commands import next_commands
from penstock_launch.watch.report import closing_report
from penstock_launch.watch.sample import NewestSample
from penstock_launch.watch.summary import LaunchFacts, forget_trainer_summary, make_summary, write_summary
from penstock_launch.watch.view import View, make_view

LOOK_EVERY_SECONDS = 0.5  # a training step takes longer, so that each gets its line
SAMPLE_EVERY_SECONDS = 1.0
EVENTS_LOG = "launcher.log"
ALL_PROCESSES = "total"
LITTLE_ROOM_BYTES = 16_000_000  # less than any checkpoint needs


@dataclass(frozen=True)
class StartedQueue:
    """A started embedded server. `section`: its address and password; `stop`: ends it in any state."""

    child: Child
    section: RedisSection
    shown: str
    stop: Callable[[], None]


class Site(Protocol):
    """Places the processes of a run."""

    @property
    def sees_all(self) -> bool:
        """Whether all of them descend from this process, so that their memory can be measured."""

    def place(self) -> Sequence[str]:
        """Decide which of its resources each process gets; returns that for the user, a line each.

        Called when nothing of an earlier launch runs, before anything is deleted. ConfigError if they do not suffice.
        """

    def start_queue(
        self, redis: RedisSection, folder: RunFolder, policy: RestartPolicy, on_end: Callable[[], None]
    ) -> StartedQueue:
        """Start the embedded server with its data in the run's folder. Main thread only."""

    def services(
        self, config: Config, folder: RunFolder, redis: RedisSection, environ: Mapping[str, str]
    ) -> Sequence[Startable]:
        """All services of a run except the queue. `redis`: the section with the queue's address."""


@dataclass(frozen=True)
class LaunchTerms:
    """The settings that differ if a scheduler runs the launch itself."""

    prepare: Callable[[RunFolder, Callable[[str], None]], bool] = RunFolder.prepare
    """Prepares the folder while its lock is held; returns whether an earlier run continues. It reports events."""
    lock_seconds: float = 0.0
    """Longest time that an earlier launcher's lock may outlive it."""
    stop_signals: Mapping[signal.Signals, RunOutcome] = field(default_factory=dict)
    """Further signals, besides those such as Ctrl-C, that end the run in order, and the name of such an end."""
    typed: Typed | None = None
    """What launched it; None if a scheduler did."""


def launch_run(
    config: Config, site: Site, environ: Mapping[str, str], started_at: float, terms: LaunchTerms | None = None
) -> int:
    """Run to the end; returns the exit code. `started_at`: Unix seconds of the start of this process."""
    folder, terms = RunFolder(config.run), terms or LaunchTerms()
    log = _EventsLog(folder.logs / EVENTS_LOG)
    with contextlib.closing(make_view(config.run.name, log.add)) as view:
        view.doing("waiting for the lock of the run's folder")
        with folder.locked(terms.lock_seconds):
            launch = _Launch(config, site, folder, view, terms)
            try:
                launch.prepare(terms, log)
                outcome = launch.run(environ)
            finally:
                launch.release()
            place = terms.typed.place if terms.typed else ""
            facts = LaunchFacts(
                started_at, launch.peak_rss_bytes(), launch.restarts(), launch.given_up(), outcome, place
            )
            view.close()
            exit_code = _conclude(folder, config, facts, terms.typed)
            launch.forget_processes()
            return exit_code


def _conclude(folder: RunFolder, config: Config, facts: LaunchFacts, typed: Typed | None) -> int:
    """Write the summary and show the closing report; the exit code, which is not 0 if there is no summary."""
    problem = ""
    summary = make_summary(folder.path, config, facts)
    try:
        write_summary(folder.path, summary)
    except PenstockError as error:
        problem = str(error)
    commands = next_commands(config, folder.path, summary, typed)
    tell(closing_report(summary, folder.path, commands, terminal_width()))
    if problem:
        complain(f"penstock: error: {problem}")
    return facts.outcome.exit_code or (PenstockError.exit_code if problem else 0)


class _Launch:
    """One launch."""

    def __init__(self, config: Config, site: Site, folder: RunFolder, view: View, terms: LaunchTerms) -> None:
        self._config = config
        self._site = site
        self._folder = folder
        self._view = view
        self._trees = ProcessTrees(folder.path, config.run.name)
        self._children: list[Child] = []
        self._stop_signals = terms.stop_signals
        self._held: HeldRun | None = None
        self._supervisor = Supervisor(self._children, view.event, self._trees.survivors, before_queue_ends=self.release)

    def prepare(self, terms: LaunchTerms, log: "_EventsLog") -> None:
        """End what an earlier launch left, choose GPUs, and prepare the folder; only then its log is opened."""
        view, folder = self._view, self._folder
        view.doing("looking for processes of an earlier launch")
        for orphan in folder.end_orphans():
            view.event(f"ended a process of an earlier launch: {orphan}")
        folder.require_deletable()
        view.doing("choosing what each process gets")
        placement = self._site.place()
        if self._config.redis.url:
            asyncio.run(self._hold_queue_of_the_user())
        view.doing("preparing the run's folder")
        continues = terms.prepare(folder, view.event)
        log.open()
        forget_trainer_summary(folder.path)
        view.event(f"run {self._config.run.name}: {'continues' if continues else 'new'}, in {folder.path}")
        for line in placement:
            view.event(line)

    async def _hold_queue_of_the_user(self) -> None:
        """Hold the run in the server of redis.url, before anything is deleted."""
        self._view.event(f"queue: connecting to redis.url (up to {self._config.redis.timeout_seconds:g} s)")
        queue = await connect(self._config)
        try:
            await self._hold(queue, self._config)
        finally:
            await queue.close()

    async def _hold(self, queue: Queue, config: Config) -> None:
        self._held = await hold_run(queue, config, self._folder.home, self._view.event)
        self._held.start_renewing(self._lost)

    def _lost(self, error: Exception) -> None:  # in the thread that renews the hold
        self._supervisor.stop(RunOutcome(LeaseLostError.exit_code, str(error)))

    def release(self) -> None:
        """Let others have the run. Blocks."""
        if self._held is not None:
            self._held.release()
            self._held = None

    def restarts(self) -> dict[str, int]:
        """By service."""
        return {child.name: child.restarts for child in self._children}

    def given_up(self) -> dict[str, str]:
        """By service that the run went on without: why."""
        return {child.name: child.given_up for child in self._children if child.given_up}

    def peak_rss_bytes(self) -> dict[str, int]:
        """Peak resident memory in bytes, by process, for those that descend from this process."""
        peaks = self._trees.peak_rss_bytes
        return {name: size for name, size in peaks.items() if self._site.sees_all or name != ALL_PROCESSES}

    def run(self, environ: Mapping[str, str]) -> RunOutcome:
        """Start everything and supervise it until nothing runs any more."""
        self._trees.sample({})
        self._view.doing("starting the queue")
        queue = self._start_queue()
        try:
            section = queue.section if queue else self._config.redis
            reachable = self._config.model_copy(update={"redis": section})
            self._folder.write_config(self._config)
            if queue:
                self._folder.write_queue(section)
            services = self._site.services(self._config, self._folder, section, environ)
            outcome = self._with_disk(asyncio.run(self._supervise(reachable, services)))
        finally:
            self._view.doing("ending: freeing what the run used")
            if queue:
                self.release()
                queue.stop()
                self._folder.forget_queue()
            free_memory_of_run(
                self._config.run.name, self._folder.path
            )  # a service that fails leaves its weights there
        return outcome

    def forget_processes(self) -> None:
        """Delete the record of the processes, when all have ended and the end is written: a reader sees one of both."""
        self._trees.forget()

    def _with_disk(self, outcome: RunOutcome) -> RunOutcome:
        """An end with a reason names a full disk too: a service could not write that into its log."""
        free_bytes = shutil.disk_usage(self._folder.path).free
        if outcome.exit_code == 0 or free_bytes >= LITTLE_ROOM_BYTES:
            return outcome
        line = f"the disk of {self._folder.path} has {free_bytes / 1e6:.1f} MB left: make room before the next launch"
        return replace(outcome, lines=(*outcome.lines, line))

    def _start_queue(self) -> StartedQueue | None:
        """Start the embedded server, unless the user has a server."""
        if self._config.redis.url:
            return None
        started = self._site.start_queue(self._config.redis, self._folder, RestartPolicy(), self._supervisor.wake)
        self._children.append(started.child)
        self._view.event(f"queue: {started.shown} on {shown_url(started.section.url)}")
        return started

    async def _supervise(self, config: Config, services: Sequence[Startable]) -> RunOutcome:
        self._view.doing("connecting to the queue")
        queue = await connect(config)
        if self._held is None:
            await self._hold(queue, config)
        else:
            await self._clear(queue)
            self._view.event(f"queue: {await queue.check_server()} at redis.url")
        assert self._held is not None
        self._folder.home.keep(self._held.folder)
        policy = RestartPolicy()
        self._children.extend(Child(service, policy) for service in services)
        supervisor = self._supervisor
        loop = asyncio.get_running_loop()
        stop_signals = (signal.SIGTERM, *heeded(signal.SIGINT, signal.SIGHUP))
        for number in stop_signals:
            loop.add_signal_handler(number, supervisor.interrupt, number)
        for number, asked in self._stop_signals.items():
            loop.add_signal_handler(number, supervisor.stop, asked)
        try:
            async with make_client(config.token) as client, asyncio.TaskGroup() as group:
                samples = NewestSample(self._folder.path)
                follower = RunFollower(queue, client, self._children, samples, lambda: supervisor.ending)
                beside = [
                    group.create_task(self._repeat(partial(self._follow, follower), LOOK_EVERY_SECONDS)),
                    group.create_task(self._repeat(self._sample, SAMPLE_EVERY_SECONDS)),
                ]
                outcome = await supervisor.run()
                for task in beside:
                    task.cancel()
        finally:
            for number in (*stop_signals, *self._stop_signals):
                loop.remove_signal_handler(number)
            with contextlib.suppress(PenstockError):
                await queue.close()
        return outcome

    async def _clear(self, queue: Queue) -> None:
        """Delete the earlier run in a queue of the user's if run.existing says so, or if it had no step.

        In the latter case services that are up keep it: without a step it is as good as a new one.
        """
        if self._config.run.existing == "replace":
            if contents := await queue.contents():
                self._view.event(f"run.existing is replace: deleting the earlier run from the queue ({contents})")
            await self._delete_keys(queue)
        elif self._folder.begins_anew and await is_as_good_as_new(queue):
            await self._delete_keys(queue)

    async def _delete_keys(self, queue: Queue) -> None:
        self._view.event(f"queue: deleted {await queue.delete_run(but_owner=True)} keys of an earlier run")

    async def _repeat(self, act: Callable[[], Awaitable[None]], pause_seconds: float) -> None:
        """Act without end. A full disk, or too many open files, is said once and ends nothing."""
        said = ""
        while True:
            try:
                await act()
                said = ""
            except (OSError, PenstockError) as error:
                if str(error) != said:
                    said = str(error)
                    self._view.event(f"{said}; the run goes on")
            await asyncio.sleep(pause_seconds)

    async def _follow(self, follower: RunFollower) -> None:
        """Show the state of the run."""
        self._view.show(await follower.look())

    async def _sample(self) -> None:
        """Measure memory and record all processes."""
        roots = {child.name: child.identity for child in self._children if child.identity and child.running}
        await asyncio.to_thread(self._trees.sample, roots)


async def is_as_good_as_new(queue: Queue) -> bool:
    """Whether the queue holds no finished step of the run, and no service of it is up."""
    return not await queue.services() and not replay(await read_ledger(queue)).has_finished_steps


class _EventsLog:
    """The launcher's log. It keeps lines until `open`, since the folder that it is in may be deleted before.

    A line that cannot be written is only shown, which is said once; the run goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: list[str] | None = []
        self._fails = False

    def open(self) -> None:
        """Write what was kept, and each later line at once."""
        kept, self._kept = self._kept or [], None
        self._write("".join(kept))

    def add(self, line: str) -> None:
        """Add a line with the time of day, in UTC."""
        stamped = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n"
        if self._kept is None:
            self._write(stamped)
        else:
            self._kept.append(stamped)

    def _write(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            if not self._fails:
                complain(f"penstock: {self._path} cannot be written ({error.strerror}); the run goes on without it")
            self._fails = True
        else:
            self._fails = False

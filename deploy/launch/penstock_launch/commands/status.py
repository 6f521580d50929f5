"""`penstock status`: the present state of a run, seen from outside.

Finds the run by its name or folder, or by its configuration, and its services through its queue: `redis.url`, or the
address that the launcher wrote to the run's folder.
"""

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.broker import connect
from penstock.config import Config
from penstock.config.load import load_config
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock.errors import ConfigError, PenstockError, QueueError
from penstock.records import RunRecords, find_run, newest_run
from penstock.records.files import CONFIG_FILE
from penstock.records.state import RunState
from penstock.runtime.output import terminal_width
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm.known import describe_job, is_active, job_states, known_job
from penstock_launch.typed import Typed, program_of
from penstock_launch.watch.figures import duration, figures
from penstock_launch.watch.follow import ask_status, make_client, read_ready
from penstock_launch.watch.next_commands import next_commands, shown_commands
from penstock_launch.watch.report import results
from penstock_launch.watch.summary import last_summary

CONNECT_TIMEOUT_SECONDS = 3.0
CRASHED_EXIT_CODE = 1  # of a launch that could not say how it ended


class NotRunningError(PenstockError):
    """The run was not found; the message names the places that were searched."""

    kind = "not_running"


def status_config(words: Sequence[str], settings: Sequence[str], root: str) -> Config:
    """The configuration of the run that is meant: of RUN, of --config FILE, or of the run that has written last.

    words: RUN, or nothing. settings: --config and keys; a RUN has its own file, and keys are laid over it.
    """
    with_file = any(word.partition("=")[0] == "--config" for word in settings)
    if len(words) > 1 or (words and with_file):
        seen = f"RUN {words[0]!r} and --config" if with_file else f"{words[1]!r}"
        raise ConfigError(f"status: saw {seen}; expected penstock status [RUN | --config FILE]")
    if not words and settings:
        return load_config(settings)
    run = find_run(words[0], root) if words else newest_run(root)
    file = run.folder / CONFIG_FILE
    if not file.is_file():
        raise ConfigError(f"run {run.name!r} has no {file}: expected one there, or --config FILE instead of RUN")
    own = ("--run.root", str(run.folder.parent), "--run.name", run.name)
    return load_config(["--config", str(file), *settings, *own])


def show_status(config: Config) -> list[str]:
    """The lines that `penstock status` prints; NotRunningError if nothing runs."""
    states = job_states(RunFolder(config.run))
    if not is_active(states):
        return asyncio.run(_read(reachable(config)))
    lines = [f"run {config.run.name}", *describe_job(states)]
    try:
        return [*lines, *asyncio.run(_read(reachable(config)))[1:]]
    except NotRunningError:
        return [*lines, f"no service is up yet; logs: {RunFolder(config.run).logs}"]
    except PenstockError as error:  # a cluster may make its nodes unreachable
        return [*lines, f"its queue cannot be reached from here: {error}"]


def show_run(config: Config) -> list[str]:
    """The lines that `penstock status` prints: of a run that does not run, how it ended and how to go on.

    NotRunningError if there is no such run; QueueError if its queue does not answer, though it runs.
    """
    try:
        return show_status(config)
    except (NotRunningError, QueueError) as error:
        folder = RunFolder(config.run)
        if not folder.holds_earlier_run():
            raise
        records = RunRecords(folder.path)
        state = records.state()  # read once, after the queue was asked: all lines are of one moment
        if isinstance(error, QueueError) and (config.redis.url or state.name == "running"):
            raise
        return [f"run {config.run.name}", *_without_services(config, records, state)]


def _without_services(config: Config, records: RunRecords, state: RunState) -> Iterator[str]:
    """Of a run none of whose services can be asked: its state, its figures, and what can be done next."""
    width, summary = terminal_width(), last_summary(records)
    if state.name == "running":
        yield f"  {state}: it is starting or ending; logs: {RunFolder(config.run).logs}"
        yield from results(summary, width)
        return
    yield f"  {_ended(state, summary)}"
    yield from results(summary, width)
    typed = _launched(config, records)
    try:
        launched = load_config(typed.settings) if typed else config  # --config may name a file of fewer keys
    except ConfigError:  # of another release, or it lacks a secret: its launch would fail too
        launched, typed = config, None
    commands = next_commands(launched, _shortest(records.folder), _with_exit(summary, state), typed)
    if commands:
        yield from ("", "Next:", *shown_commands(commands, width))


def _ended(state: RunState, summary: Mapping[str, Any]) -> str:
    """How it ended, and at which step."""
    steps, planned = summary.get("steps", 0), summary.get("steps_planned")
    counted = f"{steps} step{'' if steps == 1 else 's'}"
    if state.name == "finished":
        return f"finished: {counted}"
    if not steps or not planned:
        return f"{state}; it has {counted}"
    return f"{state}{' ' if state.name == 'stopped' else ', '}at step {steps} of {planned}"


def _with_exit(summary: Mapping[str, Any], state: RunState) -> dict[str, Any]:
    """What ended the run is what its state says: a launch that crashed has left no summary."""
    code = state.exit_code if state.exit_code is not None else 0 if state.name == "finished" else CRASHED_EXIT_CODE
    return {**summary, "exit": {"code": code}}


def _launched(config: Config, records: RunRecords) -> Typed | None:
    """The launch of the run by the configuration that its folder holds; None if it is not known where it ran."""
    place = records.summary().get("place", "slurm" if known_job(RunFolder(config.run)) else "local")
    file = _shortest(records.folder) / CONFIG_FILE
    if place == "slurm" or not file.is_file():
        return None
    settings = ["--config", str(file)]
    written = records.config().get("run") or {}
    if (Path(written.get("root", "")) / str(written.get("name", ""))).absolute() != records.folder:
        settings += ["--run.root", str(_shortest(records.folder.parent)), "--run.name", records.name]
    return Typed(program_of(sys.argv[0]), place, tuple(settings))


def _shortest(path: Path) -> Path:
    """As it is typed in the folder in which this runs."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def reachable(config: Config) -> Config:
    """The configuration with the address of the run's queue; NotRunningError if there is none."""
    if config.redis.url:
        section = config.redis.model_copy(update={"timeout_seconds": CONNECT_TIMEOUT_SECONDS})
        return config.model_copy(update={"redis": section})
    folder = RunFolder(config.run)
    address = folder.read_queue()
    states = job_states(folder)
    if address is None or not (folder.live_launcher() or is_active(states)):
        job = f", {describe_job(states)[0].strip()}" if states else ""
        raise NotRunningError(
            f"run {config.run.name!r} is not running: no live launcher in {folder.path}{job}, and redis.url is empty; "
            "`penstock launch` starts it, and `penstock runs` lists those that there are"
        )
    section = config.redis.model_copy(
        update={"url": address.url, "password": address.password, "timeout_seconds": CONNECT_TIMEOUT_SECONDS}
    )
    # Validated again, so that the password becomes a secret.
    return config.model_copy(update={"redis": type(section).model_validate(section.model_dump())})


async def _read(config: Config) -> list[str]:
    queue = await connect(config)
    try:
        records = await queue.services()
        depths = await queue.depths()
    finally:
        await queue.close()
    if not records:
        raise NotRunningError(
            f"run {config.run.name!r} is not running: its queue answers, but no service is registered there"
        )
    lines = [f"run {config.run.name}"]
    async with make_client(config.token) as client:
        for record in records:
            reason = await read_ready(client, record.url)
            policy = f", version {record.policy}" if record.policy else ""
            engine = f", {record.engine}" if record.engine else ""
            lines.append(f"  {record.name}: {reason or _shown(record)}{policy}{engine}, {record.url}")
        lines += _missing(config, records)
        trainers = [record for record in records if record.kind is ServiceKind.TRAINER]
        status = await ask_status(client, trainers[0].url) if trainers else None
    if status is None:
        groups = " ".join(f"{name} {depth}" for name, depth in depths.items())
        return [*lines, "the trainer does not answer: it is starting or ending", f"queue {groups}"]
    waiting = [f"waiting for {status.waiting_for}"] if status.waiting_for else []
    width = max(len(name) for name, _ in figures(status))
    return [
        *lines,
        f"phase {status.phase}",
        *waiting,
        *(f"  {name:{width}}  {value}" for name, value in figures(status)),
        f"  {'oldest ticket':{width}}  waits for {duration(status.oldest_waiting_seconds)}",
    ]


def _shown(record: ServiceRecord) -> str:
    """Of a service that is ready: that it is, or, of those that users' code may hold up, what it waits for."""
    return record.state if record.kind in (ServiceKind.AGENT, ServiceKind.REWARD) else "ready"


def _missing(config: Config, records: Sequence[ServiceRecord]) -> Iterator[str]:
    """A line for each kind of which fewer services are registered than the configuration asks for."""
    for kind, wanted in config.num_services.items():
        found = sum(record.kind is kind for record in records)
        if kind is not ServiceKind.TRAINER and found < wanted:
            yield f"  {kind}: {found} of {wanted} are up; {RunFolder(config.run).logs} says what became of the rest"

"""`penstock status`: the present state of a run, seen from outside.

Finds the run by its name or folder, or by its configuration, and its services through its queue: `redis.url`, or the
address that the launcher wrote to the run's folder.
"""

import asyncio
from collections.abc import Iterator, Sequence

from penstock.broker import connect
from penstock.config import Config
from penstock.config.load import load_config
from penstock.contracts import ServiceKind
from penstock.contracts.services import ServiceRecord
from penstock.errors import ConfigError, PenstockError
from penstock.records import RunRecords, find_run, newest_run
from penstock.records.files import CONFIG_FILE
from penstock.runtime.output import terminal_width
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm.known import describe_job, is_active, job_states
from penstock_launch.watch.figures import duration, figures
from penstock_launch.watch.follow import ask_status, make_client, read_ready
from penstock_launch.watch.report import results
from penstock_launch.watch.summary import last_summary

CONNECT_TIMEOUT_SECONDS = 3.0


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


def show_end(config: Config) -> list[str]:
    """What became of a run that is not running, and its figures; nothing if there is no such run."""
    folder = RunFolder(config.run)
    if not folder.holds_earlier_run():
        return []
    records = RunRecords(folder.path)
    return [f"run {config.run.name}", f"  {records.state()}", *results(last_summary(records), terminal_width())]


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
            "start it with `penstock launch`"
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
        return [*lines, "the trainer does not answer yet", f"queue {groups}"]
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

"""`penstock status`: what a run does at the moment, seen from outside.

Finds the run through its queue: `redis.url`, or the address that the launcher left in the run's folder. Called by the
command line and by `penstock_launch.ask`.
"""

import asyncio

from penstock.broker import connect
from penstock.config import Config
from penstock.errors import PenstockError
from penstock_launch.figures import duration, figures
from penstock_launch.follow import TRAINER_KIND, make_client, read_ready, read_status
from penstock_launch.run_folder import RunFolder
from penstock_launch.trees import LAUNCHER, read_known

CONNECT_TIMEOUT_SECONDS = 3.0


class NotRunningError(PenstockError):
    """Nothing of the run was found; the message says where it was looked for."""

    kind = "not_running"


def show_status(config: Config) -> list[str]:
    """The lines that `penstock status` prints; NotRunningError when nothing runs."""
    return asyncio.run(_read(reachable(config)))


def reachable(config: Config) -> Config:
    """The configuration with the address of the run's queue; NotRunningError when there is none."""
    if config.redis.url:
        section = config.redis.model_copy(update={"timeout_seconds": CONNECT_TIMEOUT_SECONDS})
        return config.model_copy(update={"redis": section})
    folder = RunFolder(config.run)
    address = folder.read_queue()
    launchers = [known for known in read_known(folder.path, config.run.name) if known.service == LAUNCHER]
    if address is None or not any(known.identity.alive for known in launchers):
        raise NotRunningError(
            f"run {config.run.name!r} is not running: no live launcher in {folder.path} and redis.url is empty; "
            "start it with `penstock launch local --config FILE`"
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
            lines.append(f"  {record.name}: {'ready' if reason is None else reason}{policy}{engine}, {record.url}")
        trainers = [record for record in records if record.kind == TRAINER_KIND]
        status = await read_status(client, trainers[0].url) if trainers else None
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

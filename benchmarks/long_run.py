"""What a run costs after so many steps: to begin again, to be asked for its status, to keep in memory and in the queue.

Owns the run: its files and its ledger as a trainer leaves them, without a model. In turns the ledger holds all records,
and what a trainer leaves in it once a checkpoint covers the others. "Begin" is what a trainer does with ledger, journal
and the lines of steps before it loads a checkpoint; times are CPU seconds of this process. A million steps need 2 GB of
disk.

    .venv/bin/python -m benchmarks.long_run                                    # some minutes
"""

import argparse
import asyncio
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import msgspec

from penstock.broker import Queue, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.broker.lease import acquire_lease
from penstock.broker.trainer import TrainerQueue
from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import CheckpointRecord, Record, RunRecord, StepRecord, WeightsRecord, archived
from penstock_trainer.checkpoints.history import KEPT_STEPS
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.rollouts.versions import Versions
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.records import StepLine
from penstock_trainer.telemetry.status import Status

BATCH_SIZE = 8
NUM_ASKS = 200
ARCHIVED_AT_ONCE = 5000
RUN = RunRecord("d" * 16, 1000, BATCH_SIZE, 16, 0)
STATISTICS = {f"figure_{number}": number / 7 for number in range(40)}  # as many as a line has


def records_of(start: int, end: int) -> Iterator[Record]:
    """Those of a range of steps."""
    if start == 0:
        yield RUN
        yield WeightsRecord(PolicyIdentity(0, "0" * 16), 0)
    for step in range(start, end):
        tickets = tuple(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE))
        yield StepRecord(step, tickets, f"{step:08d}.1.pack", f"{step:016x}", step, settings="e" * 16)
        yield WeightsRecord(PolicyIdentity(step + 1, f"{step:016x}"), step + 1)


def write_lines(folder: Path, num_steps: int) -> None:
    """The lines of all steps, of which each has its own number."""
    line = StepLine(
        step=0, version=1, epoch=0.5, tickets=tuple(range(BATCH_SIZE)), started_at=1e9, ended_at=1e9 + 1,
        seconds=dict.fromkeys(("wait", "commit", "update", "push_wait", "stage", "push", "step"), 0.25),
        generation_seconds=1.0, generated_tokens=4096, reward_mean=0.5, staleness_max=1, staleness_mean=0.5,
        statistics={**STATISTICS, "grad_norm": 1.0},
    )  # fmt: skip
    before, after = msgspec.json.encode(asdict(line)).split(b'"step":0', 1)
    folder.mkdir(parents=True)
    with (folder / "steps.jsonl").open("wb") as file:
        file.writelines(b'%b"step":%d%b\n' % (before, step, after) for step in range(num_steps))


@dataclass
class Cost:
    """CPU seconds to begin, by part; CPU of an answer; bytes in the queue, what stays in memory, and its peak."""

    ledger_seconds: float
    lines_seconds: float
    status_milliseconds: float
    queue_bytes: int
    memory_bytes: int
    peak_bytes: int

    def shown(self) -> str:
        return (
            f"{self.ledger_seconds:>17.2f}{self.lines_seconds:>10.2f}{self.status_milliseconds:>12.3f}"
            f"{self.queue_bytes / 1e6:>11.2f}{self.memory_bytes / 1e6:>12.2f}{self.peak_bytes / 1e6:>10.1f}"
        )


async def timed(work: Awaitable[object]) -> float:
    start = time.process_time()
    await work
    return time.process_time() - start


async def begin_ledger(trainer: TrainerQueue, journal: Journal, versions: Versions) -> None:
    """As `History.open`, `Releases.reopen`, `restore_tickets` and `History.begin_journal` do."""
    ledger = await trainer.ledger()
    versions.restore(ledger.policies)
    assert ledger.not_ended(ledger.num_steps * BATCH_SIZE + 4) == [ledger.num_steps * BATCH_SIZE + n for n in range(4)]
    journal.begin(await trainer.ledger())


def status_of(progress: Progress) -> Status:
    return Status("run", 1, BATCH_SIZE, 1000, progress.num_steps, progress, steps=progress.num_steps)


async def measure(queue: Queue, trainer: TrainerQueue, folder: Path) -> Cost:
    """Of what lies in the queue and in the folder now."""
    journal, kept = Journal(folder / "steps"), Versions()
    ledger_seconds = await timed(begin_ledger(trainer, journal, kept))
    start = time.process_time()
    progress = Progress(folder)
    assert progress.non_finite_in_a_row == 0
    lines_seconds = time.process_time() - start
    asked = []
    for _ in range(NUM_ASKS):
        start = time.process_time()
        msgspec.json.encode(status_of(progress).shown())
        asked.append(time.process_time() - start)
    tracemalloc.start()  # in a pass of its own, since tracing takes time
    kept = Versions()
    await begin_ledger(trainer, journal, kept)
    remains = (kept, Progress(folder))
    memory, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del remains
    used = int(await queue.client.memory_usage(queue.keys.ledger, samples=0) or 0)
    return Cost(ledger_seconds, lines_seconds, 1e3 * median(asked), used, memory, peak)


def shortened(journal: Journal, num_steps: int) -> list[Record]:
    """What `History` leaves of a ledger, if it archives some steps at a time."""
    ledger: list[Record] = []
    num_bytes = 0
    ends = [*range(ARCHIVED_AT_ONCE, num_steps - KEPT_STEPS, ARCHIVED_AT_ONCE), num_steps - KEPT_STEPS]
    for start, end in pairwise([0, *ends]):
        oldest = list(records_of(start, end))
        num_bytes = journal.archive(oldest, num_bytes)
        ledger = [archived([*ledger, *oldest], num_bytes, exists=())]
    return [*ledger, *records_of(ends[-1], num_steps), CheckpointRecord(num_steps, f"{num_steps:08d}.1")]


async def measure_run(root: Path, num_steps: int, server: EmbeddedServer, *, full: bool) -> None:
    config = Config.model_validate(
        {
            "actor": {"path": "unused"},
            "data": {"train": {"path": "unused"}},
            "run": {"name": "long", "root": str(root)},
            "redis": {"url": server.url, "password": server.password, "timeout_seconds": 600},
        }
    )
    queue = await connect(config)
    lease = await acquire_lease(queue, config)
    lease.start_renewing(print)
    trainer = TrainerQueue(queue, lease)
    try:
        write_lines(root / "long", num_steps)
        if full:
            await trainer.rebuild(list(records_of(0, num_steps)))
            print(f"{num_steps:>9}  {'full':<10}", (await measure(queue, trainer, root / "long")).shown(), flush=True)
            await queue.client.delete(queue.keys.ledger)
        await trainer.rebuild(shortened(Journal(root / "long" / "steps"), num_steps))
        print(f"{num_steps:>9}  {'shortened':<10}", (await measure(queue, trainer, root / "long")).shown(), flush=True)
    finally:
        await asyncio.to_thread(lease.release)
        await queue.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--full-to", type=int, default=100_000, help="longer ledgers are not measured in full")
    options = parser.parse_args(arguments)
    print(f"{'steps':>9}  {'ledger':<10}{'begin: ledger, s':>18}{'lines, s':>10}", end="")
    print(f"{'status, ms':>12}{'queue, MB':>11}{'memory, MB':>12}{'peak, MB':>10}")
    for num_steps in options.steps:
        with tempfile.TemporaryDirectory() as name, EmbeddedServer(Path(name) / "queue") as server:
            asyncio.run(measure_run(Path(name), num_steps, server, full=num_steps <= options.full_to))


if __name__ == "__main__":
    main()

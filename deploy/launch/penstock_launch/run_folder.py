"""The folder of one run: its content, its lock, and the treatment of an earlier run in it.

    <run.root>/<run.name>/
        config.yaml            the configuration as it was resolved, without secrets
        queue.json             where the embedded queue listens (readable by its owner only)
        processes.json         the processes of a launch that has not ended in order
        logs/<service>.log     one log for each service
        queue/                 the data of the embedded queue
        folder_id, lease       the id by which the queue knows this folder, the last lease (`penstock.run_home`)
        trainer_summary.json   written by the trainer; summary.json: that and the launcher's facts

Invariant: one launcher at a time, by a lock that ends with its process.
"""

import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from penstock.config import Config, RedisSection, RunSection
from penstock.config.shown import as_yaml, without_secrets
from penstock.contracts.ledger import replay
from penstock.durable import write_durably, writing
from penstock.errors import ConfigError, DataError, PenstockError
from penstock.records.files import (
    COMPLETIONS_FILE,
    CONFIG_FILE,
    DEAD_FILE,
    DROPPED_FILE,
    EVALUATIONS_FILE,
    PROCESSES_FILE,
    STEPS_FILE,
    STEPS_READ_FILE,
    SUMMARY_FILE,
)
from penstock.records.processes import LAUNCHER, read_known, read_record
from penstock.records.run import RunRecords
from penstock.records.state import read_end
from penstock.run_home import ID_FILE, RunHome
from penstock.runtime.process import ProcessIdentity, kill_all

QUEUE_FILE = "queue.json"
LOCK_FILE = ".lock"
LOCK_POLL_SECONDS = 0.5
MADE_BY_A_LOCK = (LOCK_FILE, ID_FILE)  # of a folder that no run has begun in
ORPHAN_GRACE_SECONDS = 10.0  # long enough for a trainer to end between two steps
NO_STEPS = "00000000."  # how the name of a checkpoint begins that was written before the first step
BEGUN = (
    *("steps", "checkpoints", "queue"),
    *(STEPS_FILE, STEPS_READ_FILE, EVALUATIONS_FILE, COMPLETIONS_FILE, DROPPED_FILE, DEAD_FILE, SUMMARY_FILE),
)
MARKS = (CONFIG_FILE, "logs", "queue", PROCESSES_FILE, "steps", "checkpoints")


class QueueAddress(msgspec.Struct, frozen=True):
    """The content of `queue.json`."""

    url: str
    password: str


class RunFolder:
    """Paths of a run, and the decisions about existing content."""

    def __init__(self, run: RunSection) -> None:
        self.run = run
        self.path = Path(run.root) / run.name
        self.logs = self.path / "logs"
        self.queue = self.path / "queue"
        self.config_path = self.path / CONFIG_FILE
        self.home = RunHome(self.path, LAUNCHER)
        self.begins_anew = False
        """Whether `prepare` found a run that had ended before its first step, and deleted what it had begun."""

    @contextlib.contextmanager
    def locked(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Hold the run; ConfigError if another launcher still holds it after `wait_seconds`. Blocks."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK_FILE).open("ab")
        except OSError as error:
            raise ConfigError(
                f"run.root: cannot write in {self.path} ({error.strerror}); expected a folder that can be written"
            ) from None
        with lock:
            if not self._lock(lock, wait_seconds):
                raise ConfigError(
                    f"run.name: {self.run.name!r} is running already ({self._holder()}); "
                    "end that first, or choose another run.name"
                )
            yield

    def _lock(self, file: BinaryIO, wait_seconds: float) -> bool:
        """Take the lock; False if it stays taken. A blocking flock has no deadline, so this polls."""
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(LOCK_POLL_SECONDS)
            except OSError as error:
                raise ConfigError(
                    f"run.root: files in {self.path} cannot be locked (flock: {error.strerror}), so that two launches "
                    "could write one run; expected a file system with locks: mount it with them (Lustre: -o flock; "
                    "NFS: with its lock service), or set run.root to a folder on another one"
                ) from None
            else:
                return True

    def _holder(self) -> str:
        pids = [known.pid for known in read_known(self.path, self.run.name) if known.service == LAUNCHER]
        return f"its launcher has pid {pids[0]}" if pids else "its launcher holds the lock of the folder"

    def live_launcher(self) -> ProcessIdentity | None:
        """The launcher of the run on this host; None if there is none."""
        record = read_record(self.path)
        return record.live_launcher(self.run.name) if record else None

    def holds_earlier_run(self) -> bool:
        """Whether the folder holds anything but the lock and its id."""
        return self.path.is_dir() and any(entry.name not in MADE_BY_A_LOCK for entry in self.path.iterdir())

    def end_orphans(self) -> list[str]:
        """End processes that an earlier launch left; returns them as `service (pid)`. Call it with the lock held."""
        orphans = [known for known in read_known(self.path, self.run.name) if known.identity.alive]
        kill_all([known.identity for known in orphans], ORPHAN_GRACE_SECONDS)
        left = [known for known in orphans if known.identity.alive]
        if left:
            shown = ", ".join(f"{known.service} (pid {known.pid})" for known in left)
            raise PenstockError(
                f"an earlier launch of {self.run.name!r} left {shown}, which does not end; end it first"
            )
        return [f"{known.service} (pid {known.pid})" for known in orphans]

    def prepare(self, on_event: Callable[[str], None]) -> bool:
        """Apply run.existing and prepare the folder; returns whether an earlier run continues.

        `on_event` is called with what is about to be deleted.
        """
        earlier = self.holds_earlier_run()
        if earlier and self.run.existing == "refuse":
            raise ConfigError(
                f"run.existing is refuse and {self.path} holds an earlier run; "
                "choose another run.name, or set run.existing to resume (replace would delete that run)"
            )
        if earlier and self.run.existing == "replace":
            self._delete_content(on_event)
            earlier = False
        if earlier and self.ended_before_a_step():
            self._delete_begun(on_event)
            earlier = False
        with writing(str(self.logs)):
            self.logs.mkdir(exist_ok=True)
        return earlier

    def require_deletable(self) -> None:
        """ConfigError if run.existing is replace, which deletes the folder, and it holds something else than a run."""
        if self.run.existing != "replace" or not self.holds_earlier_run():
            return
        if not any((self.path / name).exists() for name in MARKS):
            raise ConfigError(
                f"run.existing is replace, but {self.path} does not look like the folder of a run "
                f"(expected one of {', '.join(MARKS)}) and is not deleted; choose another run.root or run.name"
            )

    def _delete_content(self, on_event: Callable[[str], None]) -> None:
        self.require_deletable()
        entries = [entry for entry in self.path.iterdir() if entry.name != LOCK_FILE]
        counts = {"checkpoints": "checkpoints/*/", "recorded steps": "steps/*.pack", "final models": "final"}
        found = ", ".join(f"{len(list(self.path.glob(pattern)))} {name}" for name, pattern in counts.items())
        on_event(f"run.existing is replace: deleting the earlier run in {self.path} ({found})")
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def ended_before_a_step(self) -> bool:
        """Whether the last launch failed or was stopped, and no step was ever finished.

        A launch that was killed left no summary: what it had generated is gone on with.
        """
        end = read_end(self.path)
        if end is None or end.code == 0 or (self.path / "final").exists():
            return False
        if any(not path.name.startswith(NO_STEPS) for path in self.path.glob("checkpoints/*")):
            return False
        try:
            return not replay(RunRecords(self.path).ledger()).has_finished_steps
        except (DataError, ValueError, msgspec.MsgspecError, OSError):  # the trainer names it
            return False

    def _delete_begun(self, on_event: Callable[[str], None]) -> None:
        """Delete what a resumed run would go on from; logs stay."""
        on_event(f"the last launch in {self.path} ended before its first step: this run begins anew")
        for name in BEGUN:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.begins_anew = True

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration, for the services and for the user."""
        text = as_yaml(without_secrets(config))
        write_durably(self.config_path, text.encode())

    def write_queue(self, redis: RedisSection) -> None:
        """Write the address of the embedded queue for `penstock status`."""
        password = redis.password.get_secret_value() if redis.password else ""
        write_durably(self.path / QUEUE_FILE, msgspec.json.encode(QueueAddress(redis.url, password)), mode=0o600)

    def read_queue(self) -> QueueAddress | None:
        """The address of the embedded queue; None if none was started, or it ended in order."""
        try:
            return msgspec.json.decode((self.path / QUEUE_FILE).read_bytes(), type=QueueAddress)
        except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
            return None

    def forget_queue(self) -> None:
        """Delete the address: the embedded queue has ended."""
        (self.path / QUEUE_FILE).unlink(missing_ok=True)

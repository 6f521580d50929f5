"""`penstock cancel`: ends a run in order, on this host or in Slurm, if its folder is on this file system.

Invariant: no work is lost: the trainer writes its checkpoint first, and the same `launch` command continues from it.
"""

import signal
import time

from penstock.config import Config
from penstock.errors import PenstockError
from penstock.runtime.process import wait_until_gone
from penstock_launch.commands.status import NotRunningError
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm import scheduler
from penstock_launch.slurm.known import is_active, job_states, known_job
from penstock_launch.supervise.supervisor import Grace

RUNNING = "RUNNING"
POLL_SECONDS = 1.0  # Slurm sends no event at the end of a job


def cancel(config: Config) -> str:
    """End the run; returns how it ended. NotRunningError if it does not run."""
    folder = RunFolder(config.run)
    states, job_id = job_states(folder), known_job(folder)
    if job_id is not None and is_active(states):
        return _cancel_job(folder, job_id, runs=states[0].state == RUNNING)
    launcher = folder.live_launcher()
    if launcher is None:
        raise NotRunningError(
            f"run {config.run.name!r} is not running: no live launcher of this host and no Slurm job in {folder.path}"
        )
    launcher.send(signal.SIGTERM)
    if wait_until_gone({launcher}, _longest_end_seconds()):
        raise PenstockError(
            f"the launcher (pid {launcher.pid}) has not ended within {_longest_end_seconds():g} s; see {folder.logs}"
        )
    return f"run {config.run.name} has ended"


def _cancel_job(folder: RunFolder, job_id: str, *, runs: bool) -> str:
    if not runs:
        scheduler.cancel(job_id)
        return f"Slurm job {job_id} is out of the queue"
    scheduler.signal_batch(job_id, "TERM")
    deadline = time.monotonic() + _longest_end_seconds()
    while is_active(job_states(folder)):
        if time.monotonic() > deadline:
            scheduler.cancel(job_id)
            return f"Slurm job {job_id} did not end in order within {_longest_end_seconds():g} s and was cancelled"
        time.sleep(POLL_SECONDS)
    return f"Slurm job {job_id} has ended"


def _longest_end_seconds() -> float:
    grace = Grace()
    return grace.trainer_seconds + grace.others_seconds + grace.queue_seconds

"""`python -m penstock_launch.slurm.job --config F`: the launcher inside a Slurm job, its batch script's last command.

Owns one life of the job: it launches the run like any other. If the run ended in order because the time limit was near,
it has Slurm queue the job again. Exit codes: `penstock.errors`.
"""

import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence

from pydantic import SecretStr

from penstock.config import Config
from penstock.config.load import load_config
from penstock.runtime.output import tell
from penstock_launch.exit_codes import exit_code_of
from penstock_launch.launch import LaunchTerms, launch_run
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm import scheduler
from penstock_launch.slurm.attempt import forget_attempts
from penstock_launch.slurm.known import begins_anew, has_steps
from penstock_launch.slurm.site import SlurmJob
from penstock_launch.supervise.supervisor import RunOutcome

TIME_LIMIT_SIGNAL = signal.SIGUSR1  # the signal that the job script requests: --signal=B:USR1@...
TIME_IS_UP = RunOutcome(128 + TIME_LIMIT_SIGNAL, "the time limit is near")
LOCK_SECONDS = 120.0  # a network file system takes a while to release the lock of a node that failed
KILLED_WITHIN_SECONDS = 600.0  # the default of KillWait is 30


def main(argv: Sequence[str]) -> int:
    """Run this life of the job; returns its exit code."""
    started_at = time.time()
    logging.basicConfig(level=logging.WARNING, format="penstock: %(message)s")
    return exit_code_of(lambda: _run(argv, started_at))


def _run(argv: Sequence[str], started_at: float) -> int:
    config = load_config(argv)
    job = SlurmJob(config.slurm.listen_host, os.environ)
    tell([f"job {job.job_id}: {'starts' if job.is_first_life else 'starts again'}"])
    terms = LaunchTerms(prepare, LOCK_SECONDS, {TIME_LIMIT_SIGNAL: TIME_IS_UP})
    exit_code = launch_run(_of_this_life(config, job), job, os.environ, started_at, terms)
    if exit_code == TIME_IS_UP.exit_code and config.slurm.requeue:
        tell([f"job {job.job_id}: is queued again and goes on from the checkpoint"])
        _queue_again(job.job_id)
    return exit_code


def prepare(folder: RunFolder, _: Callable[[str], None]) -> bool:
    """Whether there is a run to continue. `run.existing` was applied when the job was submitted."""
    folder.logs.mkdir(exist_ok=True)
    forget_attempts(folder.path)
    folder.begins_anew = begins_anew(folder)
    return has_steps(folder)


def _of_this_life(config: Config, job: SlurmJob) -> Config:
    """The configuration for this life: only the first life may replace an earlier run in the user's Redis. There is
    always a token, since other hosts can reach the ports.
    """
    run = config.run if job.is_first_life else config.run.model_copy(update={"existing": "resume"})
    token = config.token or SecretStr(secrets.token_hex(16))
    return config.model_copy(update={"run": run, "token": token})


def _queue_again(job_id: str) -> None:
    """Queue the job again, and wait until Slurm kills this process (KillWait after its SIGTERM).

    Slurm queues the components again one after the other. If the batch script ended by itself meanwhile, Slurm would
    take that for the end of the job, and the job would fail.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    scheduler.requeue(job_id)
    time.sleep(KILLED_WITHIN_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m penstock_launch.slurm.job --config F`: the launcher inside a Slurm job, its batch script's last command.

Owns what a life of the job means: it launches the run like any other, and when the time limit is near and the run has
ended in order, has Slurm queue the job again. Exit codes: `penstock.errors`.
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
from penstock.errors import PenstockError
from penstock_launch.launch import Terms, launch_run
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm import scheduler
from penstock_launch.slurm.attempt import forget_attempts
from penstock_launch.slurm.site import SlurmJob
from penstock_launch.supervise.supervisor import Outcome

TIME_LIMIT_SIGNAL = signal.SIGUSR1  # what the job script asks for: --signal=B:USR1@...
TIME_IS_UP = Outcome(128 + TIME_LIMIT_SIGNAL, "the time limit is near")
LOCK_SECONDS = 120.0  # a network file system takes a while to forget the lock of a node that failed
KILLED_WITHIN_SECONDS = 600.0  # the default of KillWait is 30
STEPS_FOLDER = "steps"  # the trainer's: what there is to continue


def main(argv: Sequence[str]) -> int:
    """Run this life of the job; its exit code."""
    started_at = time.time()
    logging.basicConfig(level=logging.WARNING, format="penstock: %(message)s")
    try:
        config = load_config(argv)
        job = SlurmJob(config.slurm.listen_host, os.environ)
        print(f"job {job.job_id}: {'starts' if job.is_first_life else 'starts again'}", flush=True)
        terms = Terms(_prepare, LOCK_SECONDS, {TIME_LIMIT_SIGNAL: TIME_IS_UP}, goes_on_with_fewer=True)
        exit_code = launch_run(_of_this_life(config, job), job, os.environ, started_at, terms)
        if exit_code == TIME_IS_UP.exit_code and config.slurm.requeue:
            print(f"job {job.job_id}: is queued again and goes on from the checkpoint", flush=True)
            _queue_again(job.job_id)
    except PenstockError as error:
        print(f"penstock: {error.kind}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return exit_code


def _prepare(folder: RunFolder, _: Callable[[str], None]) -> bool:
    """What becomes of an earlier run was decided at the submission."""
    folder.logs.mkdir(exist_ok=True)
    forget_attempts(folder.path)
    return (folder.path / STEPS_FOLDER).exists()


def _of_this_life(config: Config, job: SlurmJob) -> Config:
    """Only the first life replaces what a Redis of the user's holds; ports that others reach are never left open."""
    run = config.run if job.is_first_life else config.run.model_copy(update={"existing": "resume"})
    token = config.token or SecretStr(secrets.token_hex(16))
    return config.model_copy(update={"run": run, "token": token})


def _queue_again(job_id: str) -> None:
    """Does not end before Slurm kills this process (KillWait after its SIGTERM).

    The components are queued again one after the other, and a batch script that ends meanwhile, on its own account, is
    taken for the end of the job: it fails instead.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    scheduler.requeue(job_id)
    time.sleep(KILLED_WITHIN_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a submission writes down in the run's folder: the job's id, for commands outside of the job, and whether the run
begins anew, for the job.

Owns these files. Invariant: the second is there only for a run whose last try ended before its first step, until that
run has step files: the job may then delete what the try left in a queue of the user's.
"""

from collections.abc import Sequence

import msgspec

from penstock.durable import write_durably
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm import scheduler
from penstock_launch.slurm.scheduler import ComponentState
from penstock_launch.slurm.shares import COMPONENTS

JOB_FILE = "slurm.json"
ANEW_FILE = "slurm/begins-anew"  # beside the files of attempts
STEPS_FOLDER = "steps"  # the trainer's step files: if they exist, there is a run to continue


class KnownJob(msgspec.Struct, frozen=True):
    """The content of `slurm.json`."""

    job_id: str


def remember_job(folder: RunFolder, job_id: str) -> None:
    """Write down that this is the run's job from now on."""
    write_durably(folder.path / JOB_FILE, msgspec.json.encode(KnownJob(job_id)))


def known_job(folder: RunFolder) -> str | None:
    """The id of the run's newest job; None if it never had one."""
    try:
        return msgspec.json.decode((folder.path / JOB_FILE).read_bytes(), type=KnownJob).job_id
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def remember_beginning(folder: RunFolder) -> None:
    """Write down what the submission has found out about the last try."""
    path = folder.path / ANEW_FILE
    if folder.begins_anew:
        write_durably(path, b"")
    else:
        path.unlink(missing_ok=True)


def begins_anew(folder: RunFolder) -> bool:
    """Whether the job begins a run whose last try has left something behind."""
    return (folder.path / ANEW_FILE).exists() and not has_steps(folder)


def has_steps(folder: RunFolder) -> bool:
    """Whether there is a run to continue."""
    return (folder.path / STEPS_FOLDER).exists()


def job_states(folder: RunFolder) -> list[ComponentState]:
    """The components of the run's newest job; empty if Slurm has no record of one."""
    job_id = known_job(folder)
    return scheduler.find_job(job_id) if job_id else []


def is_active(states: Sequence[ComponentState]) -> bool:
    """Whether the job runs or will run."""
    return any(each.active for each in states)


def describe_job(states: Sequence[ComponentState]) -> list[str]:
    """A line for each component."""
    lines = []
    for number, each in enumerate(states):
        component = COMPONENTS[number] if len(states) == len(COMPONENTS) else "job"
        where = f" on {each.nodes}" if each.nodes else ""
        times = f", for {each.used}, {each.left} left" if each.state == "RUNNING" else ""
        why = f" ({each.reason})" if each.reason not in ("", "None") else ""
        lines.append(f"  {component:8}  Slurm job {each.name}: {each.state}{why}{where}{times}")
    return lines

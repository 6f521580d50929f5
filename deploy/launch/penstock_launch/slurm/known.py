"""Finds the Slurm job of a run from outside the job: its id is in `slurm.json` in the run's folder, its state in Slurm.

Owns that file.
"""

from collections.abc import Sequence

import msgspec

from penstock.durable import write_durably
from penstock_launch.run_folder import RunFolder
from penstock_launch.slurm import scheduler
from penstock_launch.slurm.scheduler import ComponentState
from penstock_launch.slurm.shares import COMPONENTS

JOB_FILE = "slurm.json"


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

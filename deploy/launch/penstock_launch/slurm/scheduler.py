"""The Slurm commands that Penstock calls, each with a deadline; their failures become SlurmError.

Owns how they are called and how their output is parsed. Invariant: nothing else starts sbatch, squeue, sacct, scancel
or scontrol.
"""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.errors import PenstockError

TIMEOUT_SECONDS = 60.0  # a busy controller may answer late
QUEUE_FORMAT = "%i|%T|%M|%L|%N|%r"
# States of a job that has not ended: it runs, will run, or is about to end.
ACTIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "STAGE_OUT",
    "SIGNALING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SPECIAL_EXIT",
}


class SlurmError(PenstockError):
    """A Slurm command is missing, failed, or did not answer in time."""

    kind = "slurm"


@dataclass(frozen=True)
class ComponentState:
    """One component of a job, as squeue shows it. `used`, `left`: times; `reason`: why it waits or failed."""

    name: str
    state: str
    used: str = ""
    left: str = ""
    nodes: str = ""
    reason: str = ""

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


def submit(script: Path, environ: Mapping[str, str]) -> str:
    """Submit a job script with this environment; returns the id of the job (of its first component)."""
    return _run(["sbatch", "--parsable", str(script)], environ).strip().partition(";")[0]


def find_job(job_id: str) -> list[ComponentState]:
    """The components of a job; once the controller has dropped the job, from the accounting, if there is one."""
    try:
        answer = _run(["squeue", "--noheader", "--states=all", f"--jobs={job_id}", f"--format={QUEUE_FORMAT}"])
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        answer = ""
    found = [ComponentState(*line.strip().split("|", 5)) for line in answer.splitlines() if line.strip()]
    return sorted(found, key=lambda each: each.name) or _read_accounting(job_id)


def _read_accounting(job_id: str) -> list[ComponentState]:
    """The components in Slurm's accounting; empty if there is none."""
    try:
        answer = _run(
            ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job_id}", "--format=JobID,State"]
        )
    except SlurmError:
        return []
    pairs = [line.split("|", 1) for line in answer.splitlines() if "|" in line]
    return [ComponentState(name, state.split()[0]) for name, state in pairs]


def signal_batch(job_id: str, signal_name: str) -> None:
    """Signal the batch script of a job, which is its launcher, and no other process of the job."""
    _run(["scancel", "--batch", f"--signal={signal_name}", job_id])


def cancel(job_id: str) -> None:
    """End a job at once, or take it out of the queue."""
    _run(["scancel", job_id])


def requeue(job_id: str) -> None:
    """End this life of a job and queue it again."""
    _run(["scontrol", "requeue", job_id])


def hostnames(nodelist: str) -> list[str]:
    """`gpu[1-2]` as gpu1 and gpu2."""
    return _run(["scontrol", "show", "hostnames", nodelist]).split()


def node_address(name: str) -> str:
    """The name or address by which Slurm, and so every node, reaches a node."""
    fields = dict(
        word.split("=", 1) for word in _run(["scontrol", "show", "node", name, "--oneliner"]).split() if "=" in word
    )
    return fields.get("NodeAddr") or name


def _run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """The output of a command; SlurmError if it fails."""
    try:
        done = subprocess.run(
            command,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not on PATH; expected Slurm's commands: run this on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{' '.join(command)}: no answer within {TIMEOUT_SECONDS:g} s; expected Slurm's controller to be up"
        ) from None
    if done.returncode != 0:
        output = " / ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        raise SlurmError(f"{' '.join(command)}: exit code {done.returncode}: {output or 'no output'}")
    return done.stdout

"""The section of the Slurm launcher: the resources of a job, and how its services are started."""

from typing import Annotated

from pydantic import Field

from penstock.config.types import Count, Section

Option = Annotated[str, Field(pattern=r"^-[^\r\n]+$")]
Line = Annotated[str, Field(pattern=r"^[^\r\n]*$")]


class SlurmComponentSection(Section):
    """One component of the job."""

    nodes: Count = 1
    """Its nodes. No two components share one."""
    cpus_per_node: Count = 4
    """CPUs on each."""
    memory_per_node: Line = ""
    """Memory on each, such as 64G; empty: the partition's default."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs on each (`--gres=gpu:N`); each rollout server there has as many as its engine uses, each rank one."""
    gpu_type: Line = ""
    """Their type, such as a100; empty: any."""
    partition: Line = ""
    """Its partition; empty: `slurm.partition`."""
    sbatch: tuple[Option, ...] = ()
    """Further `#SBATCH` options of this component, such as --constraint=h100."""
    srun: tuple[Option, ...] = ()
    """Further options of `srun` for its services, such as --container-image=IMAGE; empty: `slurm.srun`."""
    prefix: tuple[Line, ...] = ()
    """Words before the command of its services, such as [apptainer, exec, --nv, IMAGE]; empty: `slurm.prefix`."""
    python: Line = ""
    """Interpreter of its services, such as the one in its container; empty: `slurm.python`."""


class SlurmSection(Section):
    """`penstock launch slurm`: one heterogeneous job of three components. See docs/slurm.md."""

    partition: Line = ""
    """Partition of all components; empty: the cluster's default."""
    account: Line = ""
    """Account that is charged; empty: the user's default."""
    qos: Line = ""
    """Quality of service; empty: the default."""
    time_limit: Line = ""
    """Longest time of one life of the job, such as 8:00:00 or 2-00:00:00; empty: the partition's."""
    signal_seconds: Annotated[int, Field(ge=0, le=65535)] = 300
    """This long before the time limit, the run writes a checkpoint, ends and is queued again; 0: it is just killed."""
    requeue: bool = True
    """Queue the job again after the failure of a node and before its time limit; it resumes where it stopped."""
    sbatch: tuple[Option, ...] = ()
    """Further `#SBATCH` options of all components."""
    srun: tuple[Option, ...] = ()
    """Further options of `srun` for all services, such as those of pyxis."""
    prefix: tuple[Line, ...] = ()
    """Words before the command of all services, such as those of apptainer."""
    python: Line = ""
    """Interpreter of all services; empty: the one that launches."""
    setup: tuple[Line, ...] = ()
    """Lines of shell that prepare the environment before anything starts, such as `module load cuda`."""
    template: str = ""
    """Job script to fill in instead of the built-in one, deploy/slurm/job.sh."""
    listen_host: Line = "0.0.0.0"
    """Address on which a service listens if its own `host` is loopback, where no other node could reach it; also for
    the embedded queue."""
    services: SlurmComponentSection = SlurmComponentSection()
    """Queue, reward and agent services; the launcher runs on its first node."""
    rollout: SlurmComponentSection = SlurmComponentSection()
    """Rollout services with their engines, distributed evenly over the nodes."""
    trainer: SlurmComponentSection = SlurmComponentSection()
    """Trainer; `trainer.num_ranks` ranks, distributed evenly over the nodes."""

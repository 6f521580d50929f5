"""A Slurm job as the site of a run: each service is a step of one of its components.

Owns the srun of each service, and the addresses by which nodes reach each other. The launcher itself and the embedded
queue run on the first node of the component `services`, in the batch step.
"""

from collections.abc import Callable, Mapping, Sequence

from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config, RedisSection, SlurmComponentSection
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError
from penstock_launch.gpus.shares import Share
from penstock_launch.launch import StartedQueue
from penstock_launch.run_folder import RunFolder
from penstock_launch.services import commands
from penstock_launch.slurm import scheduler
from penstock_launch.slurm.shares import COMPONENT_OF_KIND, COMPONENTS, ServiceShare, section_of, share_of
from penstock_launch.slurm.steps import Step
from penstock_launch.supervise.child import Child, Command, EmbeddedQueue
from penstock_launch.supervise.life import LocalLife
from penstock_launch.supervise.restarts import RestartPolicy
from penstock_launch.supervise.supervisor import TRAINER


class SlurmJob:
    """This job as the site of the run, seen from its batch step."""

    sees_all = False

    def __init__(self, listen_host: str, environ: Mapping[str, str]) -> None:
        """ConfigError unless this process runs in a job that `penstock launch slurm` has submitted."""
        try:
            self.job_id = environ["SLURM_JOB_ID"]
            self._node = environ["SLURMD_NODENAME"]
            self._trainer_nodes = environ[f"SLURM_JOB_NODELIST_HET_GROUP_{COMPONENTS.index(TRAINER)}"]
        except KeyError as error:
            raise ConfigError(
                f"{error.args[0]} is not in the environment; expected the batch step of a heterogeneous Slurm job, as "
                "`penstock launch slurm` submits it"
            ) from None
        self.is_first_life = int(environ.get("SLURM_RESTART_COUNT", "0")) == 0
        self._listen_host = listen_host

    def start_queue(
        self, redis: RedisSection, folder: RunFolder, policy: RestartPolicy, on_end: Callable[[], None]
    ) -> StartedQueue:
        server = EmbeddedServer(
            folder.queue,
            log_path=folder.logs / "queue.log",
            listen=self._listen_host,
            host=scheduler.node_address(self._node),
        )
        server.start()
        assert server.process is not None
        child = Child(EmbeddedQueue(server), policy, running=LocalLife(server.process, server.log_path))
        return StartedQueue(child, server.section(redis), f"{server.version} (embedded)", server.stop)

    def place(self) -> Sequence[str]:
        """Nothing: Slurm has given each component of the job its nodes."""
        return ()

    def services(
        self, config: Config, folder: RunFolder, redis: RedisSection, environ: Mapping[str, str]
    ) -> Sequence[Step]:
        def share(kind: ServiceKind, _: int) -> Share:
            return Share(gpu_threads=share_of(config, kind).gpu_threads)

        return [self._step(config, folder, command) for command in commands(config, folder, redis, environ, share)]

    def _step(self, config: Config, folder: RunFolder, command: Command) -> Step:
        kind = ServiceKind(command.name.partition("-")[0])
        section, share = section_of(config, COMPONENT_OF_KIND[kind]), share_of(config, kind)
        python, *words = command.arguments
        python = section.python or python
        meeting: tuple[str, ...] = ()
        if share.num_nodes > 1:
            first = scheduler.hostnames(self._trainer_nodes)[0]
            meeting = ("--meet", scheduler.node_address(first), "--num-hosts", str(share.num_nodes))
        return Step(
            command.name,
            (
                *srun_words(kind, section, share, command.name),
                *(*section.prefix, python, "-m", "penstock_launch.slurm.node"),
                *("--run", str(folder.path), *meeting),
            ),
            (python, *words),
            command.environment,
            folder=folder.path,
            log_path=command.log_path,
            hint=command.hint,
        )


def srun_words(kind: ServiceKind, section: SlurmComponentSection, share: ServiceShare, name: str) -> tuple[str, ...]:
    """`srun` and its options, for a service of a kind."""
    return (
        "srun",
        f"--het-group={COMPONENTS.index(COMPONENT_OF_KIND[kind])}",
        f"--job-name={name}",
        f"--nodes={share.num_nodes}",
        f"--ntasks={share.num_nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={share.cpus}",
        "--mem=0",  # all memory of the component's node, shared with its other services
        *((f"--gres=gpu:{share.gpus}",) if section.gpus_per_node else ()),
        "--exact",
        "--kill-on-bad-exit=1",
        *section.srun,
    )

"""The resources of each component of the job, and the share of them that each service in it gets.

Pure. Owns the rule that a component has full nodes, and that its services are spread evenly over them: each of them,
whatever its kind, has an equal part of the CPUs there, and a rollout server as many GPUs as it uses.
"""

from dataclasses import dataclass

from penstock.config import Config, SlurmComponentSection
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError
from penstock_launch.gpus.shares import threads_of

COMPONENTS = ("services", "rollout", "trainer")  # in the job's order; the index is srun's --het-group
COMPONENT_OF_KIND = {
    ServiceKind.ROLLOUT: "rollout",
    ServiceKind.AGENT: "services",
    ServiceKind.REWARD: "services",
    ServiceKind.TRAINER: "trainer",
}
COUNT_KEYS = {
    ServiceKind.ROLLOUT: "rollout.num_servers",
    ServiceKind.AGENT: "agent.num_services",
    ServiceKind.REWARD: "reward.num_services",
}


@dataclass(frozen=True)
class ServiceShare:
    """The resources of one service: its nodes, and its CPUs and GPUs on each of them.

    gpu_threads: of each of its processes that computes on a GPU; 0 if none does.
    """

    num_nodes: int
    cpus: int
    gpus: int
    gpu_threads: int = 0


def section_of(config: Config, component: str) -> SlurmComponentSection:
    """The keys of a component; if it does not set one, the key of the full job holds."""
    slurm = config.slurm
    section = {"services": slurm.services, "rollout": slurm.rollout, "trainer": slurm.trainer}[component]
    return section.model_copy(
        update={
            "partition": section.partition or slurm.partition,
            "sbatch": (*slurm.sbatch, *section.sbatch),
            "srun": section.srun or slurm.srun,
            "prefix": section.prefix or slurm.prefix,
            "python": section.python or slurm.python,
        }
    )


def share_of(config: Config, kind: ServiceKind) -> ServiceShare:
    """The share of each service of a kind; ConfigError if a node has too little for its services."""
    component = COMPONENT_OF_KIND[kind]
    section = section_of(config, component)
    if kind is ServiceKind.TRAINER:
        _check_ranks(config, section)
        num_ranks = 0 if config.trainer.device == "cpu" else config.trainer.num_ranks // section.nodes
        return _share(section, section.nodes, section.cpus_per_node, section.gpus_per_node, num_ranks)
    counts = {each: count for each, count in config.num_services.items() if COMPONENT_OF_KIND[each] == component}
    per_node = -(-sum(counts.values()) // section.nodes)
    if kind is ServiceKind.ROLLOUT and counts[kind] < section.nodes:
        raise ConfigError(
            f"{COUNT_KEYS[kind]} is {counts[kind]} and slurm.{component}.nodes {section.nodes}: expected at least one "
            "for each node; raise the former or lower the latter"
        )
    cpus = section.cpus_per_node // per_node
    if cpus == 0:
        asked = " and ".join(f"{COUNT_KEYS[each]} {count}" for each, count in counts.items())
        raise ConfigError(
            f"slurm.{component}.cpus_per_node is {section.cpus_per_node} and {asked} on {section.nodes} nodes: "
            f"expected at least one for each of the {per_node} services of a node; raise the former, or "
            f"slurm.{component}.nodes"
        )
    gpus = config.rollout.engine.num_gpus if kind is ServiceKind.ROLLOUT and config.rollout.engine.takes_gpus else 0
    _check_gpus(section, component, per_node, gpus)
    return _share(section, 1, cpus, gpus, gpus)


def _share(section: SlurmComponentSection, num_nodes: int, cpus: int, gpus: int, num_processes: int) -> ServiceShare:
    """`num_processes`: of the service on a node, that compute on its GPUs."""
    threads = threads_of(cpus, num_processes) if num_processes and section.gpus_per_node else 0
    return ServiceShare(num_nodes, cpus, gpus if section.gpus_per_node else 0, threads)


def _check_gpus(section: SlurmComponentSection, component: str, per_node: int, gpus: int) -> None:
    """Without any, a server runs on its CPUs, unless it has to shard its model."""
    has = section.gpus_per_node
    if (has or gpus > 1) and per_node * gpus > has:
        raise ConfigError(
            f"slurm.{component}.gpus_per_node is {has} and a node has {per_node} servers, each with {gpus} GPUs by "
            "rollout.engine.tensor_parallel_size and rollout.engine.gpus_per_server: expected at least "
            f"{per_node * gpus}; raise the former, or slurm.{component}.nodes, or lower one of the others"
        )


def idle_gpus(config: Config) -> list[str]:
    """For the user: GPUs that the job asks for and no service uses, a line for each component with some."""
    lines = []
    for kind, count in ((ServiceKind.ROLLOUT, config.rollout.num_servers), (ServiceKind.TRAINER, 1)):
        section, share = section_of(config, str(kind)), share_of(config, kind)
        per_node = -(-count // section.nodes) * share.gpus
        if kind is ServiceKind.TRAINER:
            per_node = 0 if config.trainer.device == "cpu" else config.trainer.num_ranks // section.nodes
        if per_node < section.gpus_per_node:
            has = section.gpus_per_node
            lines.append(f"slurm.{kind}.gpus_per_node is {has}, of which the processes of a node use {per_node}")
    return lines


def _check_ranks(config: Config, section: SlurmComponentSection) -> None:
    num_ranks, nodes = config.trainer.num_ranks, section.nodes
    if num_ranks % nodes:
        raise ConfigError(
            f"trainer.num_ranks is {num_ranks} and slurm.trainer.nodes {nodes}: expected a multiple of the latter, the "
            "same number of ranks on each node"
        )
    if section.gpus_per_node and num_ranks // nodes > section.gpus_per_node and config.trainer.device != "cpu":
        raise ConfigError(
            f"slurm.trainer.gpus_per_node is {section.gpus_per_node} and trainer.num_ranks {num_ranks} on {nodes} "
            "nodes: expected a GPU for each rank; raise the former or lower the latter"
        )

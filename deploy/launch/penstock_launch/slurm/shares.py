"""The resources of each component of the job, and the share of them that each service in it gets.

Pure. Owns the rule that a component has full nodes, and that its services are spread evenly over them.
"""

from dataclasses import dataclass

from penstock.config import Config, SlurmComponentSection
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError

COMPONENTS = ("services", "rollout", "trainer")  # in the job's order; the index is srun's --het-group
COMPONENT_OF_KIND = {ServiceKind.REWARD: "services", ServiceKind.ROLLOUT: "rollout", ServiceKind.TRAINER: "trainer"}


@dataclass(frozen=True)
class ServiceShare:
    """The resources of one service: its nodes, and its CPUs and GPUs on each of them."""

    num_nodes: int
    cpus: int
    gpus: int


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
        return ServiceShare(section.nodes, section.cpus_per_node, section.gpus_per_node)
    key, count = {
        ServiceKind.REWARD: ("reward.num_services", config.reward.num_services),
        ServiceKind.ROLLOUT: ("rollout.num_servers", config.rollout.num_servers),
    }[kind]
    per_node = -(-count // section.nodes)
    if kind is ServiceKind.ROLLOUT and count < section.nodes:
        raise ConfigError(
            f"{key} is {count} and slurm.{component}.nodes {section.nodes}: expected at least one for each node; "
            "raise the former or lower the latter"
        )
    cpus, gpus = section.cpus_per_node // per_node, section.gpus_per_node // per_node
    if cpus == 0 or (gpus == 0 and section.gpus_per_node):
        what, has = ("cpus", section.cpus_per_node) if cpus == 0 else ("gpus", section.gpus_per_node)
        raise ConfigError(
            f"slurm.{component}.{what}_per_node is {has} and {key} {count} on {section.nodes} nodes: expected at least "
            f"one for each of the {per_node} services of a node; raise the former, or slurm.{component}.nodes"
        )
    return ServiceShare(1, cpus, gpus)


def _check_ranks(config: Config, section: SlurmComponentSection) -> None:
    num_ranks, nodes = config.trainer.num_ranks, section.nodes
    if num_ranks % nodes:
        raise ConfigError(
            f"trainer.num_ranks is {num_ranks} and slurm.trainer.nodes {nodes}: expected a multiple of the latter, the "
            "same number of ranks on each node"
        )
    if section.gpus_per_node and num_ranks // nodes > section.gpus_per_node:
        raise ConfigError(
            f"slurm.trainer.gpus_per_node is {section.gpus_per_node} and trainer.num_ranks {num_ranks} on {nodes} "
            "nodes: expected a GPU for each rank; raise the former or lower the latter"
        )

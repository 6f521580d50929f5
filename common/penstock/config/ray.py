"""The section for the placement of a run on a Ray cluster (`penstock launch ray`)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from penstock.config.types import Seconds, Section

Cpus = Annotated[float, Field(gt=0)]
Gpus = Annotated[float, Field(ge=0)]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class RayRolloutSection(Section):
    """What each rollout server reserves; all of them are one placement group."""

    num_cpus: Cpus = 1
    """CPUs."""
    num_gpus: Gpus | None = None
    """GPUs; it sees no others; empty: as many as an engine uses (`rollout.engine.tensor_parallel_size`) if the cluster
    has any, else 0."""
    resources: dict[str, float] = Field(default={})
    """Further resources of its node, by their names in Ray."""
    strategy: Strategy = "SPREAD"
    """How Ray distributes the servers over nodes."""


class RayTrainerSection(Section):
    """What each rank of the trainer reserves; all of them are one placement group."""

    num_cpus: Cpus = 1
    """CPUs."""
    num_gpus: Gpus | None = None
    """GPUs; it sees no others; empty: 1 if the cluster has any, else 0."""
    resources: dict[str, float] = Field(default={})
    """Further resources of its node, by their names in Ray."""
    strategy: Strategy = "PACK"
    """How Ray distributes the ranks over nodes; STRICT_PACK: on one node or not at all."""


class RayAgentSection(Section):
    """What each agent service reserves, anywhere."""

    num_cpus: Cpus = 1
    """CPUs, also for its environments and `agent.command`."""
    resources: dict[str, float] = Field(default={})
    """Further resources of its node, by their names in Ray."""


class RayRewardSection(Section):
    """What each reward service reserves, anywhere."""

    num_cpus: Cpus = 1
    """CPUs; it uses at most `reward.num_workers` of them."""
    resources: dict[str, float] = Field(default={})
    """Further resources of its node, by their names in Ray."""


class RaySection(Section):
    """The Ray cluster of `penstock launch ray` (docs/ray.md)."""

    address: str = "auto"
    """auto: the cluster that RAY_ADDRESS names or to which this host belongs; else host:port of its head."""
    place_seconds: Seconds = 300
    """Longest time until a service is placed on the cluster, including an autoscaler's time."""
    runtime_env: dict[str, Any] = Field(default={})
    """Ray's runtime environment of the services: env_vars, working_dir, pip and so on; not for secrets."""
    rollout: RayRolloutSection = RayRolloutSection()
    """Rollout servers."""
    trainer: RayTrainerSection = RayTrainerSection()
    """Trainer ranks."""
    agent: RayAgentSection = RayAgentSection()
    """Agent services."""
    reward: RayRewardSection = RayRewardSection()
    """Reward services."""

"""What each process on this host is given: GPUs that it sees, CPUs near them, threads.

Owns the variables by which CUDA finds a process's GPUs. Invariant: on a host with visible GPUs each process sees its
own and no others; on one without, it is given nothing.
"""

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from penstock.config import Config
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError
from penstock_launch.gpus.fit import RunMemory, fit
from penstock_launch.gpus.nvidia import VISIBLE, read_driver
from penstock_launch.gpus.plan import Gpus, Placement, plan

NODES = Path("/sys/devices/system/node")
MOST_THREADS = 16  # of a process on a GPU: they load and copy, at the speed of the host's memory

NO_MEMORY = RunMemory()

Cpus = frozenset[int]


@dataclass(frozen=True)
class Share:
    """Of one process. gpu_threads: if it computes on GPUs; 0: on the CPU. cpus: on which it may run; empty: all.

    overrides: of the configuration, on its command line.
    """

    variables: Mapping[str, str] = field(default_factory=dict)
    gpu_threads: int = 0
    cpus: Cpus = frozenset()
    overrides: tuple[str, ...] = ()


class PlacedRun:
    """The shares of all processes of a run."""

    def __init__(
        self,
        config: Config,
        placement: Placement,
        allowed: Cpus,
        node_cpus: Callable[[int], Cpus],
        memory: RunMemory = NO_MEMORY,
    ) -> None:
        """`allowed`: the CPUs of this process. `node_cpus`: those of a NUMA node. `memory`: what GPUs have to hold."""
        self.placement = placement
        self.memory = memory
        self._allowed = allowed
        self._node_cpus = node_cpus
        self._config = with_gpus(config, placement)
        lists = {"--trainer.gpus": self._config.trainer.gpus, "--rollout.gpus": self._config.rollout.gpus}
        self._overrides = tuple(word for key, names in lists.items() if names for word in (key, ",".join(names)))

    def share(self, kind: ServiceKind, index: int = 0) -> Share:
        """Of the service number `index` of a kind."""
        if not self.placement.gpus:
            return Share()
        gpus = self._gpus(kind, index)
        variables = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VISIBLE: ",".join(self.placement.names(gpus))}
        cpus, num_threads = self._near(gpus)
        overrides = {
            # It chooses its transport by the lists of both sides.
            ServiceKind.TRAINER: (*self._overrides, *self.memory.trainer_overrides),
            ServiceKind.ROLLOUT: self.memory.server_overrides(index),
        }
        return Share(variables, num_threads, cpus, overrides.get(kind, ()))

    def lines(self) -> list[str]:
        """For the user: a line for each process, one for the transport, and the warnings."""
        placement = self.placement
        if not placement.gpus:
            return list(placement.warnings)
        servers = [self._line(ServiceKind.ROLLOUT, index) for index in range(len(placement.servers))]
        transport = self._config.transport_from("cuda" if placement.trainer else "cpu")
        return [
            *servers,
            self._line(ServiceKind.TRAINER),
            f"weights: by {transport}{', on a GPU that trainer and server share' if placement.shared else ''}",
            *self.memory.lines(),
            *placement.warnings,
        ]

    def _line(self, kind: ServiceKind, index: int = 0) -> str:
        gpus, share = self._gpus(kind, index), self.share(kind, index)
        name = f"{kind}-{index}" if kind is ServiceKind.ROLLOUT and len(self.placement.servers) > 1 else str(kind)
        if not gpus:
            return f"{name}: no GPU"
        near = ", ".join(str(node) for node in sorted({gpu.numa_node for gpu in gpus if gpu.numa_node is not None}))
        where = f", on the {len(share.cpus)} CPUs of NUMA node {near}" if share.cpus else ""
        threads = f"{share.gpu_threads} thread{'s' * (share.gpu_threads > 1)}{' for each' * (len(gpus) > 1)}"
        return f"{name}: GPU {', '.join(self.placement.names(gpus))}; {threads}{where}"

    def _gpus(self, kind: ServiceKind, index: int) -> Gpus:
        if kind is ServiceKind.TRAINER:
            return self.placement.trainer
        return self.placement.servers[index] if kind is ServiceKind.ROLLOUT else ()

    def _near(self, gpus: Gpus) -> tuple[Cpus, int]:
        """The CPUs of the NUMA nodes of a process's GPUs, and the threads for each of these.

        No CPUs in particular if a node is not known, or if these are all, or too few for the processes near them.
        """
        if not gpus:
            return frozenset(), 0
        placement = self.placement
        all_nodes = [gpu.numa_node for group in (placement.trainer, *placement.servers) for gpu in group]
        nodes = {gpu.numa_node for gpu in gpus}
        near = frozenset[int]().union(*(self._node_cpus(node) for node in nodes if node is not None)) & self._allowed
        num_sharing = sum(node in nodes for node in all_nodes)
        if None in nodes or near == self._allowed or len(near) < num_sharing:
            return frozenset(), threads_of(len(self._allowed), len(all_nodes))
        return near, threads_of(len(near), num_sharing)


def shown_placement(config: Config, environ: Mapping[str, str]) -> list[str]:
    """What `penstock launch local` would do here with a configuration, or why it would not, line by line, with a table
    of the memory that each process needs.
    """
    try:
        run = place(config, environ)
    except ConfigError as error:
        return ["GPUs on this host: `penstock launch local` is refused:", *str(error).splitlines()]
    lines = run.lines()
    return ["GPUs on this host:", *lines, *run.memory.table()] if lines else ["GPUs on this host: none is visible"]


def place(config: Config, environ: Mapping[str, str]) -> PlacedRun:
    """Place a run on this host; ConfigError if its GPUs do not suffice. Asks the driver, which takes a second or so."""
    placement = plan(config, read_driver(environ), environ)
    placement = replace(placement, warnings=(*placement.warnings, *_unused_by_torch(config, placement)))
    memory = fit(with_gpus(config, placement), placement, psutil.virtual_memory().total)
    return PlacedRun(config, placement, frozenset(os.sched_getaffinity(0)), read_node_cpus, memory)


def with_gpus(config: Config, placement: Placement) -> Config:
    """The configuration with the GPUs of both sides in its lists."""
    servers = tuple(name for server in placement.servers for name in placement.names(server))
    return config.model_copy(
        update={
            "trainer": config.trainer.model_copy(update={"gpus": placement.names(placement.trainer)}),
            "rollout": config.rollout.model_copy(update={"gpus": servers}),
        }
    )


def _unused_by_torch(config: Config, placement: Placement) -> list[str]:
    """A warning if the trainer's torch, that of this interpreter, is a build of PyTorch's own index for CPUs.

    ConfigError with trainer.device cuda: the trainer would refuse it, after the launch has begun.
    """
    try:
        version = importlib.metadata.version("torch") if placement.trainer else ""
    except importlib.metadata.PackageNotFoundError:
        return []  # the trainer will say so
    if not version.endswith("+cpu"):
        return []
    built, remedy = f"torch {version} is built without CUDA", "make the environments for CUDA (`make envs CUDA=1`)"
    if config.trainer.device == "cuda":
        raise ConfigError(f"trainer.device is cuda, and its {built}: {remedy}, or set trainer.device to auto or cpu")
    return [f"the trainer's {built}, so it trains on the CPU: {remedy}, or set trainer.device to cpu"]


def read_node_cpus(node: int) -> Cpus:
    """The CPUs of a NUMA node; none if the kernel does not say."""
    try:
        text = (NODES / f"node{node}" / "cpulist").read_text()
        ranges = [part.partition("-") for part in text.strip().split(",") if part]
        return frozenset(cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return frozenset()


def threads_of(num_cpus: int, num_processes: int) -> int:
    """Of each of some processes on GPUs that have these CPUs together."""
    return min(MOST_THREADS, max(1, num_cpus // num_processes))

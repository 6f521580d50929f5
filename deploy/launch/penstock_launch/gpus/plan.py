"""Which GPUs of this host each process of a run gets.

Pure. Owns the rules: what is visible to the launcher is what there is; trainer and server share a GPU only if both
lists of the configuration name it, if there is no other, or if they take turns; who uses several gets them of one NUMA
node if it can.

    1 GPU     rollout 0, trainer 0 (shared)
    2 GPUs    rollout 0, trainer 1
    8 GPUs    rollout-0 0, rollout-1 1, rollout-2 2, rollout-3 3, trainer 4, 5, 6, 7        (4 servers, 4 ranks)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.gpus.memory import in_gib
from penstock_launch.gpus.nvidia import VISIBLE, Driver, Gpu, find, visible

HIDING = ("", "-1")  # values of CUDA_VISIBLE_DEVICES that are meant to leave no GPU
ROLLOUT, TRAINER = "rollout.gpus", "trainer.gpus"

Gpus = tuple[Gpu, ...]


@dataclass(frozen=True)
class Placement:
    """The GPUs of each process.

    gpus: all that are visible to the launcher; none: nothing is placed, and each process has what CUDA shows it.
    trainer: of its ranks, in their order; servers: of each rollout server. An empty one runs on the CPU.
    warnings: for the user, a line each.
    """

    gpus: Gpus = ()
    trainer: Gpus = ()
    servers: tuple[Gpus, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def shared(self) -> Gpus:
        """Those that the trainer and a server both have."""
        return tuple(gpu for gpu in self.trainer if any(gpu in server for server in self.servers))

    def names(self, gpus: Gpus) -> tuple[str, ...]:
        """Their names in CUDA_VISIBLE_DEVICES, if CUDA_DEVICE_ORDER is PCI_BUS_ID.

        Numbers: SGLang converts them to integers if it shards a model. On a host with instances of MIG they are UUIDs:
        an instance has no number, and next to one CUDA's numbers are not those of nvidia-smi.
        """
        has_mig = any(gpu.is_mig for gpu in self.gpus)
        return tuple(gpu.uuid if has_mig else str(gpu.index) for gpu in gpus)


@dataclass(frozen=True)
class _Asked:
    """GPUs that the processes use: of each server, and one for each rank."""

    num_servers: int
    per_server: int
    num_ranks: int

    @property
    def num_gpus(self) -> int:
        return self.num_servers * self.per_server + self.num_ranks

    def __str__(self) -> str:
        servers = f"{self.num_servers} server{'s' * (self.num_servers > 1)} x {self.per_server}"
        return f"{servers} + {self.num_ranks} rank{'s' * (self.num_ranks != 1)} = {self.num_gpus}"


class _TooFewError(Exception):
    """A process cannot have its GPUs."""


def plan(config: Config, driver: Driver | None, environ: Mapping[str, str]) -> Placement:
    """The GPUs of each process on this host; ConfigError, with a picture, if they do not suffice.

    `driver`: of this host; None: there is none.
    """
    there = tuple(gpu for gpu in visible(driver.gpus, environ) if gpu.uuid) if driver else ()
    seen = _seen(driver, there, environ)
    asked = _asked(config)
    if not there:
        _refuse_without_gpus(config, driver, seen)
        hidden = driver and driver.gpus and environ.get(VISIBLE, "").strip() not in HIDING
        problems = (f"{seen}: no process is given a GPU",) if driver and (driver.problem or hidden) else ()
        return Placement(servers=((),) * asked.num_servers, warnings=problems)
    named = {
        ROLLOUT: _named(ROLLOUT, config.rollout.gpus, there, seen, asked.num_servers * asked.per_server),
        TRAINER: _named(TRAINER, config.trainer.gpus, there, seen, asked.num_ranks),
    }
    in_turns = config.trainer.take_turns and not config.trainer.gpus and asked.per_server > 0
    own = replace(asked, num_ranks=0) if in_turns else asked
    try:
        servers, trainer = _assigned(there, own, named[ROLLOUT], named[TRAINER])
    except _TooFewError:
        raise ConfigError(_picture(own, there, seen, named)) from None
    if in_turns:
        trainer = servers[0][: asked.num_ranks]
    placement = Placement(there, trainer, servers)
    _refuse_nccl_on_one_gpu(config, placement)
    used = tuple(_used_line(gpu) for gpu in there if gpu.is_used and gpu in (*trainer, *chain(*servers)))
    return Placement(there, trainer, servers, (*used, *_idle_turns(config, placement)))


def refuse_named(config: Config, scheduler: str) -> None:
    """ConfigError if the configuration names GPUs although a scheduler chooses those of each process."""
    for key, names in ((ROLLOUT, config.rollout.gpus), (TRAINER, config.trainer.gpus)):
        if names:
            raise ConfigError(
                f"{key} is {', '.join(names)}, and {scheduler} chooses the GPUs of each process: expected no list, or "
                "`penstock launch local`"
            )


def refuse_turns(config: Config, scheduler: str) -> None:
    """ConfigError if trainer and engines are to take turns although a scheduler gives them GPUs of their own."""
    if config.trainer.take_turns:
        raise ConfigError(
            f"trainer.take_turns is on, and {scheduler} gives trainer and servers GPUs of their own: expected it off, "
            "or `penstock launch local` on a host where they share one"
        )


def _asked(config: Config) -> _Asked:
    engine = config.rollout.engine
    num_ranks = 0 if config.trainer.device == "cpu" else config.trainer.num_ranks
    return _Asked(config.rollout.num_servers, engine.num_gpus if engine.takes_gpus else 0, num_ranks)


def _assigned(there: Gpus, asked: _Asked, rollout: Gpus, trainer: Gpus) -> tuple[tuple[Gpus, ...], Gpus]:
    """The GPUs of each server and of the trainer; _TooFewError if they do not suffice. `rollout`, `trainer`: named."""
    if len(there) == 1 and max(asked.num_servers * asked.per_server, asked.num_ranks) <= 1:
        return (there[: asked.per_server],) * asked.num_servers, there[: asked.num_ranks]
    free = [gpu for gpu in there if gpu not in rollout and gpu not in trainer]
    servers = []
    for index in range(asked.num_servers):
        first = index * asked.per_server
        servers.append(_usable(rollout[first : first + asked.per_server]) or _taken(free, asked.per_server))
    return tuple(servers), _usable(trainer) or _taken(free, asked.num_ranks)


def _usable(gpus: Gpus) -> Gpus:
    """A process computes on one instance of MIG, and NCCL does not connect several."""
    if len(gpus) > 1 and any(gpu.is_mig for gpu in gpus):
        raise _TooFewError
    return gpus


def _taken(free: list[Gpu], number: int) -> Gpus:
    """Take so many, of one NUMA node if one has enough; those in use only if the others do not suffice."""
    able = [gpu for gpu in free if number == 1 or not gpu.is_mig]
    for pool in ([gpu for gpu in able if not gpu.is_used], able):
        nodes = [[gpu for gpu in pool if gpu.numa_node == node] for node in {gpu.numa_node: 0 for gpu in pool}]
        found = next((each for each in (*nodes, pool) if len(each) >= number), None)
        if found is not None:
            taken = tuple(found[:number])
            free[:] = [gpu for gpu in free if gpu not in taken]
            return taken
    raise _TooFewError


def _named(key: str, names: Sequence[str], there: Gpus, seen: str, number: int) -> Gpus:
    """The GPUs that a list names; ConfigError unless it names as many as its processes use, each once and visible."""
    if names and len(names) != number:
        raise ConfigError(
            f"{key} names {len(names)} GPUs ({', '.join(names)}) and its processes use {number}: expected as many, "
            f"which is {_sum_of(key)}; or no list, for automatic ones"
        )
    found: list[Gpu] = []
    for name in names:
        gpu = find(there, name)
        instances = [each.uuid for each in there if each.is_mig and str(each.index) == name]
        if gpu is None or instances:
            of_it = f"one of the instances of GPU {name}, by UUID" if instances else "a number or UUID of one of them"
            raise ConfigError(f"{key}: {name!r} is no GPU here; expected {of_it}; {seen}:\n{_table(there)}")
        if gpu in found:
            raise ConfigError(f"{key}: {', '.join(names)} names GPU {gpu.index} twice; expected each GPU once")
        found.append(gpu)
    return tuple(found)


def _sum_of(key: str) -> str:
    if key == TRAINER:
        return "trainer.num_ranks (0 if trainer.device is cpu)"
    return "rollout.num_servers times the GPUs of each (0 if its engines are on a CPU or at rollout.engine.url)"


def _refuse_without_gpus(config: Config, driver: Driver | None, seen: str) -> None:
    """ConfigError if the configuration names a GPU, or a process that needs one although there is a driver."""
    needs = {ROLLOUT: ", ".join(config.rollout.gpus), TRAINER: ", ".join(config.trainer.gpus)}
    if driver is not None:
        needs |= {"rollout.engine.device": config.rollout.engine.device, "trainer.device": config.trainer.device}
    for key, value in needs.items():
        if value not in ("", "auto", "cpu"):
            raise ConfigError(f"{key} is {value}, and {seen}: expected a GPU that is visible here, or no {key}")


def _refuse_nccl_on_one_gpu(config: Config, placement: Placement) -> None:
    """By their numbers: to NCCL two instances of one GPU are one GPU too."""
    of_trainer = {gpu.index for gpu in placement.trainer}
    for number, server in enumerate(placement.servers):
        both = sorted(of_trainer & {gpu.index for gpu in server})
        if config.weights.transport == "nccl" and both:
            raise ConfigError(
                f"weights.transport is nccl, and the trainer and rollout server {number} are on GPU {both[0]}: NCCL "
                "does not connect two processes on one GPU; expected weights.transport auto (here disk) or tensor, or "
                "a GPU for each of them (rollout.gpus, trainer.gpus)"
            )


def _idle_turns(config: Config, placement: Placement) -> tuple[str, ...]:
    """A warning if nobody needs the GPUs that are given up."""
    if not config.trainer.take_turns or placement.shared:
        return ()
    return (
        "trainer.take_turns is on, and trainer and servers share no GPU: each side waits for the other in vain; name a "
        f"GPU in both {ROLLOUT} and {TRAINER}, or turn it off",
    )


def _picture(asked: _Asked, there: Gpus, seen: str, named: Mapping[str, Gpus]) -> str:
    """What was asked, what there is, and which keys to change."""
    notes = {gpu: key for key, gpus in named.items() for gpu in gpus}
    keys = "rollout.num_servers, rollout.engine.tensor_parallel_size or trainer.num_ranks"
    lines = [
        "the GPUs do not suffice:",
        f"  asked  {asked} GPUs",
        f"  there  {seen}",
        _table(there, notes),
        f"lower {keys}, let more be visible, or set rollout.engine.device or trainer.device to cpu",
    ]
    if any(gpu.is_mig for gpu in there):
        lines.append("who needs several GPUs cannot have instances of MIG: CUDA shows a process one of them")
    if any(named.values()):
        lines.append(f"a GPU in both {ROLLOUT} and {TRAINER} is shared")
    return "\n".join(lines)


def _table(gpus: Gpus, notes: Mapping[Gpu, str] | None = None) -> str:
    """A line for each."""
    width = max(len(gpu.name) for gpu in gpus)
    rows = [
        f"    {gpu.label}  {gpu.name:{width}}  {in_gib(gpu.memory_bytes)} GiB"
        + (f", {in_gib(gpu.used_bytes)} GiB in use" if gpu.is_used else "")
        + (f", in {notes[gpu]}" if notes and gpu in notes else "")
        for gpu in gpus
    ]
    return "\n".join(rows)


def _seen(driver: Driver | None, there: Gpus, environ: Mapping[str, str]) -> str:
    """What there is, as a clause."""
    if driver is None:
        return "no nvidia-smi is on PATH"
    if driver.problem:
        return f"nvidia-smi fails ({driver.problem})"
    shown = f"nvidia-smi shows {len(driver.gpus)} GPU{'s' * (len(driver.gpus) != 1)}"
    return f"{shown}, of which {VISIBLE}={environ[VISIBLE]} leaves {len(there)}" if VISIBLE in environ else shown


def _used_line(gpu: Gpu) -> str:
    return (
        f"GPU {gpu.index} ({gpu.name}): other processes have {in_gib(gpu.used_bytes)} of its "
        f"{in_gib(gpu.memory_bytes)} GiB; end them, or choose others (rollout.gpus, trainer.gpus, {VISIBLE})"
    )

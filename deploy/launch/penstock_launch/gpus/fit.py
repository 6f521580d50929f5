"""Whether the processes of a run fit into the GPUs that they are placed on, and how trainer and engine share one.

Owns what is refused before anything starts: what surely does not fit. An estimate above what a GPU has is a warning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.gpus.engine_memory import FRACTION, REQUESTS, TOKENS, EngineMemory, given_fraction
from penstock_launch.gpus.memory import CONTEXT_BYTES, MemoryNeed, in_gib, table
from penstock_launch.gpus.model_shape import ModelShape, NoShapeError, read_shape
from penstock_launch.gpus.nvidia import Gpu
from penstock_launch.gpus.plan import Placement
from penstock_launch.gpus.trainer_memory import LOADING, host_need, trainer_need

ENGINE = "rollout"  # the name of each server's need, so that equal ones are shown once
RESERVE = 0.05  # of a shared GPU, for what the estimates miss


@dataclass(frozen=True)
class SharingEngine:
    """What an engine on the trainer's GPU is started with. number: of its server."""

    number: int
    fraction: float
    num_tokens: int

    @property
    def overrides(self) -> tuple[str, ...]:
        """As words of a command line."""
        return ("--" + FRACTION, f"{self.fraction:g}", "--" + TOKENS, str(self.num_tokens))


@dataclass(frozen=True)
class RunMemory:
    """The needs of a run's processes on GPUs, by GPU. in_turns: those of one GPU are never there at once.

    warnings: for the user, a line each.
    """

    by_gpu: tuple[tuple[Gpu, tuple[MemoryNeed, ...]], ...] = ()
    sharing: tuple[SharingEngine, ...] = ()
    warnings: tuple[str, ...] = ()
    in_turns: bool = False

    @property
    def trainer_overrides(self) -> tuple[str, ...]:
        """For the trainer, which refuses prompts that the smallest cache cannot hold."""
        smallest = min((engine.num_tokens for engine in self.sharing), default=0)
        return ("--" + TOKENS, str(smallest)) if smallest else ()

    def server_overrides(self, number: int) -> tuple[str, ...]:
        """For a server; none if it shares no GPU with the trainer."""
        return next((engine.overrides for engine in self.sharing if engine.number == number), ())

    def lines(self) -> list[str]:
        """For the user: the needs, and the warnings."""
        return [*self.needs(), *self.warnings]

    def needs(self) -> list[str]:
        """What each GPU has to hold, a line each, equal ones together; then what sharing decides."""
        rows: dict[str, list[str]] = {}
        for gpu, needs in self.by_gpu:
            together = (" in turns with " if self.in_turns else " + ").join(
                f"{need.process} {in_gib(need.num_bytes)}" for need in needs
            )
            rows.setdefault(f"{together} of {in_gib(gpu.memory_bytes)} GiB (estimate)", []).append(gpu.label)
        lines = [f"memory of GPU {', '.join(numbers)}: {text}" for text, numbers in rows.items()]
        for words in {" ".join(engine.overrides): 0 for engine in self.sharing}:
            lines.append(f"the engine that shares a GPU runs with {words}")
        return lines

    def table(self) -> list[str]:
        """The parts of each need, and the keys that change them; of equal needs once."""
        return table(list({need: 0 for _, needs in self.by_gpu for need in needs}))


def fit(config: Config, placement: Placement, host_bytes: int) -> RunMemory:
    """The needs of a run on its GPUs; ConfigError, with a table, if they surely exceed one.

    `config`: with the GPUs of each side in it. Without GPUs, or if the model's shape is not known, there are none.
    `host_bytes`: the memory of the host, through which ranks load the model.
    """
    if not placement.gpus:
        return RunMemory()
    unknown = [gpu for gpu in (*placement.trainer, *chain(*placement.servers)) if not gpu.memory_bytes]
    if unknown:
        return RunMemory(warnings=_unknown(placement, f"the driver does not show that of GPU {unknown[0].index}"))
    try:
        shape = read_shape(config.actor.path)
        reference = read_shape(config.ref.path) if config.kl_ctl and config.ref.path else None
        teacher = read_shape(config.teacher.path) if config.teacher.path else None
    except NoShapeError as error:
        return RunMemory(warnings=_unknown(placement, str(error)))
    memory = fit_shape(config, placement, shape, reference, teacher)
    loading = host_need(config, shape).of(LOADING)
    if placement.trainer and loading > host_bytes:
        warning = (
            f"each rank loads the model into the host's memory first: {in_gib(loading)} GiB for trainer.num_ranks "
            f"{config.trainer.num_ranks}, and the host has {in_gib(host_bytes)}"
        )
        memory = replace(memory, warnings=(*memory.warnings, warning))
    return memory


def fit_shape(
    config: Config,
    placement: Placement,
    shape: ModelShape,
    reference: ModelShape | None = None,
    teacher: ModelShape | None = None,
) -> RunMemory:
    """Like `fit`, for a model of this shape; `reference`: that of ref.path, if it is used; `teacher`: likewise."""
    return _Fit(config, placement, shape, trainer_need(config, shape, reference, teacher)).result()


class _Fit:
    """Adds up the needs of one run."""

    def __init__(self, config: Config, placement: Placement, shape: ModelShape, trainer: MemoryNeed) -> None:
        self._config, self._placement, self._shape = config, placement, shape
        self._section = config.rollout.engine
        self._trainer = trainer
        self._by_gpu: dict[Gpu, list[MemoryNeed]] = {gpu: [] for gpu in placement.gpus}
        self._sharing: list[SharingEngine] = []
        self._warnings: list[str] = []

    def result(self) -> RunMemory:
        """See `fit`."""
        for gpu in self._placement.trainer:
            self._by_gpu[gpu].append(self._trainer)
        for number, server in enumerate(self._placement.servers):
            if server:
                self._add_engine(number, server)
        for gpu, needs in self._by_gpu.items():
            self._compare(gpu, needs)
        used = tuple((gpu, tuple(needs)) for gpu, needs in self._by_gpu.items() if needs)
        warnings = tuple(dict.fromkeys(self._warnings))
        return RunMemory(used, tuple(self._sharing), warnings, self._config.trainer.take_turns)

    def _add_engine(self, number: int, server: Sequence[Gpu]) -> None:
        """By the smallest of its GPUs: each holds as much."""
        smallest = min(server, key=lambda gpu: gpu.memory_bytes)
        engine = EngineMemory(self._section, self._shape, smallest.memory_bytes)
        received = engine.received_bytes(self._config.transport_from("cuda"), self._config.weights.bucket_bytes)
        num_tokens = self._section.max_total_tokens
        shared = next((gpu for gpu in server if gpu in self._placement.shared), None)
        if shared and not self._config.trainer.take_turns and not given_fraction(self._section):
            num_tokens = num_tokens or self._shared_tokens(engine, shared, received)
            self._sharing.append(SharingEngine(number, engine.shared_fraction, num_tokens))
        need = engine.need(ENGINE, num_tokens, received_bytes=received)
        for gpu in server:
            self._by_gpu[gpu].append(need)
        given = self._section.max_total_tokens
        if not given and need.of("key-value cache") < engine.fewest_tokens * engine.token_bytes:
            self._warnings.append(
                f"{ENGINE}: its weights leave {need.of('key-value cache') // engine.token_bytes} tokens to its "
                f"key-value cache, which is little for {REQUESTS} {self._section.max_running_requests}; the table of "
                "`penstock config` names the keys to change"
            )

    def _shared_tokens(self, engine: EngineMemory, gpu: Gpu, received_bytes: int) -> int:
        """Tokens of the cache that fit beside the trainer on `gpu`; ConfigError if they are too few to run with."""
        other = self._trainer.num_bytes + received_bytes + gpu.used_bytes + round(RESERVE * gpu.memory_bytes)
        num_tokens = engine.tokens_beside(other)
        if num_tokens < engine.fewest_tokens:
            least = engine.need(ENGINE, engine.fewest_tokens, received_bytes=received_bytes)
            raise ConfigError(
                f"trainer and engine share GPU {gpu.index} ({gpu.name}, {in_gib(gpu.memory_bytes)} GiB), and by the "
                "estimate they do not fit side by side:\n"
                + "\n".join(_indented([self._trainer, least]))
                + f"\n  in use now {in_gib(gpu.used_bytes)}, reserve {in_gib(round(RESERVE * gpu.memory_bytes))} GiB"
                f"\nexpected room for weights and a cache of {engine.fewest_tokens} tokens; change a key of the table, "
                f"give each side a GPU of its own (rollout.gpus, trainer.gpus), let them take turns "
                f"(trainer.take_turns), or set {FRACTION} if you know better"
            )
        return num_tokens

    def _compare(self, gpu: Gpu, needs: Sequence[MemoryNeed]) -> None:
        """Refuse what surely does not fit, and warn of the rest."""
        certain = self._at_once([need.certain_bytes for need in needs])
        needed = self._at_once([need.num_bytes for need in needs])
        if certain > gpu.memory_bytes:
            raise ConfigError(
                f"GPU {gpu.index} ({gpu.name}) has {in_gib(gpu.memory_bytes)} GiB, and weights, moments and gradients "
                f"there take {in_gib(certain)}:\n" + "\n".join(_indented(needs)) + "\nexpected them to fit before "
                "anything starts; change a key of the table, or use more or larger GPUs"
            )
        if needed > gpu.memory_bytes:
            self._warnings.append(
                f"GPU {gpu.index} ({gpu.name}) has {in_gib(gpu.memory_bytes)} GiB, and the estimate of its processes "
                f"is {in_gib(needed)}: it may run out of memory; the table of `penstock config` names the keys to "
                "change"
            )

    def _at_once(self, sizes: Sequence[int]) -> int:
        """Of the processes of a GPU, the trainer first.

        In its turn the contexts of the engines are there too; an engine takes of what is free when it starts.
        """
        if self._config.trainer.take_turns and sizes:
            return max(sizes[0] + CONTEXT_BYTES * (len(sizes) - 1), *sizes)
        return sum(sizes)


def _indented(needs: Sequence[MemoryNeed]) -> list[str]:
    return [f"  {line}" for line in table(needs)]


def _unknown(placement: Placement, reason: str) -> tuple[str, ...]:
    shared = f", and trainer and engine share a GPU: set {FRACTION}" if placement.shared else ""
    return (f"no estimate of memory: {reason}{shared}",)

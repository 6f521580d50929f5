"""Sections about how services run and report: rollout, reward, trainer, weights, queue, logs, tracking."""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from penstock.config.secrets import check_http_url, check_password, check_queue_url
from penstock.config.types import Count, Fraction, Gpus, Port, Seconds, Section
from penstock.contracts import Dtype, PauseMode

PLACING_FLAGS = {
    "--tp-size": "rollout.engine.tensor_parallel_size",
    "--tensor-parallel-size": "rollout.engine.tensor_parallel_size",
    "--base-gpu-id": "rollout.gpus",
}
FRACTION_FLAG = "--mem-fraction-static"
Tracker = Literal["tensorboard", "wandb", "trackio"]


def flag_in(word: str, flags: Iterable[str]) -> str | None:
    """Which of SGLang's flags a word of extra_args gives: its name, or a beginning of it, as argparse takes it.

    >>> flag_in("--tp=2", PLACING_FLAGS), flag_in("2", PLACING_FLAGS)
    ('--tp-size', None)
    """
    name = word.partition("=")[0]
    return next((flag for flag in flags if len(name) > 2 and flag.startswith(name)), None)


class EngineSection(Section):
    """The SGLang server behind a rollout service."""

    python: str = ".venv-sglang/bin/python"
    """Python interpreter of SGLang's environment."""
    url: str = ""
    """Use the server at this URL instead of starting one."""
    port: Port = 0
    """Its port on loopback; 0: a free one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto: cuda if that environment sees a GPU, else cpu."""
    dtype: Dtype = "bfloat16"
    """Type of its weights, and so of every push."""
    max_running_requests: Count = 64
    """Completions generated at once."""
    max_total_tokens: Annotated[int, Field(ge=0)] = 0
    """Size of its key-value cache in tokens; 0: SGLang decides (on a CPU: 65536). A prompt plus its completion must be
    shorter by 6 tokens, and by two pages if SGLang is given a larger page."""
    memory_fraction: Fraction = 0.0
    """Share of the memory that is free at its start, for weights and key-value cache (`--mem-fraction-static`); 0: on a
    GPU that it shares with the trainer, the local launcher computes it, with `max_total_tokens`, from the trainer's
    need (docs/gpu.md); else SGLang decides (on a CPU: 0.9, or 0.4 without `max_total_tokens`). Its weights, and what
    others take while it loads them, must stay below this share: else its start fails."""
    context_length: Annotated[int, Field(ge=0)] = 0
    """Context in tokens; 0: the model's. A prompt plus its completion must be shorter by 6: SGLang would cut it."""
    start_timeout_seconds: Seconds = 300
    """Time after its start until it must answer."""
    start_attempts: Count = 4
    """Starts in a row that may fail before its rollout service gives up; the waits between them are 2, 6, 18 ... s."""
    request_timeout_seconds: Seconds = 600
    """Longest time that one group may take."""
    tensor_parallel_size: Count = 1
    """GPUs over which it shards each tensor of the model (SGLang's `--tp-size`)."""
    gpus_per_server: Annotated[int, Field(ge=0)] = 0
    """GPUs of each server; 0: tensor_parallel_size. A multiple of that for an engine that extra_args makes use of them,
    as `--pp-size` does."""
    num_threads: Count = 1
    """CPU threads, if it runs on a CPU."""
    skip_special_tokens: bool = True
    """Leave the tokenizer's special tokens out of the text that reward functions see; false: for rewards on tags that
    are special tokens of the model."""
    extra_args: tuple[str, ...] = ()
    """Further command-line arguments of `sglang.launch_server`."""

    @field_validator("url")
    @classmethod
    def _is_of_a_server(cls, value: str) -> str:
        if value:
            check_http_url(value)
        return value

    @model_validator(mode="after")
    def _has_one_fraction(self) -> "EngineSection":
        if self.memory_fraction and any(flag_in(each, (FRACTION_FLAG,)) for each in self.extra_args):
            raise ValueError(
                f"rollout.engine.memory_fraction is {self.memory_fraction:g}, and extra_args hold {FRACTION_FLAG} too: "
                "expected one of them"
            )
        return self

    @model_validator(mode="after")
    def _has_the_gpus_that_it_is_given(self) -> "EngineSection":
        if flag := next(filter(None, (flag_in(each, PLACING_FLAGS) for each in self.extra_args)), None):
            raise ValueError(
                f"rollout.engine.extra_args holds {flag}, by which an engine takes other GPUs than it is given: "
                f"expected {PLACING_FLAGS[flag]} instead"
            )
        tensors, given = self.tensor_parallel_size, self.gpus_per_server
        if given % tensors:
            raise ValueError(
                f"rollout.engine.gpus_per_server is {given} and tensor_parallel_size {tensors}: expected a multiple of "
                "the latter, or 0 for as many"
            )
        if given > tensors and not self.extra_args:
            raise ValueError(
                f"rollout.engine.gpus_per_server is {given} and tensor_parallel_size {tensors}: the server would not "
                "use the others; raise tensor_parallel_size, or say in extra_args what they are for, such as --pp-size"
            )
        return self

    @property
    def num_gpus(self) -> int:
        """GPUs of each server, if it takes any."""
        return self.gpus_per_server or self.tensor_parallel_size

    @property
    def takes_gpus(self) -> bool:
        """Whether a server that is started takes GPUs if there are some."""
        return self.device != "cpu" and not self.url


class RolloutSection(Section):
    """The rollout service."""

    host: str = "127.0.0.1"
    """Address that it listens on."""
    advertise_host: str = ""
    """Name or address that it registers; empty: `host`. With auto, or if it is empty and `host` is 0.0.0.0 or ::, this
    host's address on the route to `redis.url`."""
    port: Port = 0
    """First port; further servers take the next ones. 0: free ones."""
    num_servers: Count = 1
    """Rollout services that the local launcher starts."""
    gpus: Gpus = ()
    """GPUs of all servers on one host, `rollout.engine.gpus_per_server` for each in this order: numbers as nvidia-smi
    shows them, or UUIDs (of an instance of MIG: its own). Empty: chosen among those that are visible."""
    engine: EngineSection = EngineSection()
    """Its SGLang server."""


class RewardSection(Section):
    """The reward service."""

    host: str = "127.0.0.1"
    """Address that it listens on."""
    advertise_host: str = ""
    """Name or address that it registers; empty: `host`. With auto, or if it is empty and `host` is 0.0.0.0 or ::, this
    host's address on the route to `redis.url`."""
    port: Port = 0
    """First port; further services take the next ones. 0: a free one."""
    num_services: Count = 1
    """Reward services that the local launcher starts."""
    functions: dict[str, float] = Field(default={"exact_match": 1.0})
    """Weighted sum of functions: a built-in name or `module:function`, and its weight. In a run with agents also
    `environment`, the score that the environment gave; there the default is `environment` alone."""
    gates: dict[str, float] = Field(default={})
    """Functions that must give at least a value before the others count: of a completion for which one gives less, only
    the functions that are named here are summed."""
    max_magnitude: Annotated[float, Field(gt=0, le=1e12)] = 1e6
    """Largest absolute value of a score (the weighted sum); a larger one counts as failed and is never trained on."""
    scale: Annotated[float, Field(gt=0, le=1e12)] = 1.0
    """The trainer multiplies the score by this before it makes advantages of it. Score, curves of rewards and
    evaluations stay as they are (docs/rewards.md)."""
    clip: tuple[float, float] | None = None
    """Then it bounds the result: `[low, high]`; null: no bounds. After weights, gates and `scale`, before penalties of
    `loss` (overlong, truncated) and a KL term in the reward."""
    modules_path: str = "."
    """Folder that is added to the import path for `module:function`."""
    timeout_seconds: Seconds = 10
    """A call that takes longer is killed and counts as failed, never as 0."""
    num_workers: Count = 1
    """Processes that run reward functions."""
    max_attempts: Count = 3
    """Calls of a function on one completion if it fails in a way that may pass: transient error, timeout, crash. A
    built-in function that timed out is not called again."""
    retry_seconds: Seconds = 0.5
    """Wait before the second call; doubled before each further one, and shortened at random by up to half."""
    retry_cap_seconds: Seconds = 10
    """Longest such wait."""
    breaker_failures: Annotated[int, Field(ge=0)] = 16
    """This many such failures in a row, or three that were killed at their deadline, open a function's breaker, if a
    call that was answered before now fails too (docs/rewards.md): groups that need it are parked; 0: never."""
    breaker_seconds: Seconds = 10
    """After this long, an open breaker lets a single call through; its success closes the breaker."""

    @field_validator("clip")
    @classmethod
    def _bounds_in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] >= value[1]:
            raise ValueError("expected [low, high] with low below high, or null for no bounds")
        return value

    @model_validator(mode="after")
    def _calls_what_has_a_gate(self) -> Self:
        idle = [name for name in self.gates if not self.functions.get(name)]
        if idle:
            raise ValueError(
                f"reward.gates names {', '.join(idle)}: expected functions of reward.functions whose weight is not "
                f"0 ({', '.join(self.functions)})"
            )
        return self


class TrainerSection(Section):
    """The trainer service."""

    host: str = "127.0.0.1"
    """Address that it listens on."""
    advertise_host: str = ""
    """Name or address that it registers; empty: `host`. With auto, or if it is empty and `host` is 0.0.0.0 or ::, this
    host's address on the route to `redis.url`."""
    port: Port = 0
    """Port; 0: a free one."""
    standby: bool = False
    """Wait without limit while another trainer of the run works, and take over when it ends or dies; false: wait at
    most `run.stall_seconds`."""
    num_ranks: Count = 1
    """Processes that the local launcher trains with, one per GPU (or on the CPU), the model sharded over them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: cuda if its torch sees a GPU, else cpu."""
    gpus: Gpus = ()
    """GPUs of its ranks on one host, one for each, named as in `rollout.gpus`; a GPU of both lists is shared. Empty:
    chosen among those that are visible."""
    take_turns: bool = False
    """Trainer and engines take turns on the same GPUs, for models that do not fit side by side (docs/gpu.md): while the
    trainer computes, the engines give up their GPU memory; while they generate, it is in host memory. For
    `staleness.max_staleness` 0 or 1."""


class WeightsSection(Section):
    """How new weights reach the rollout servers."""

    transport: Literal["auto", "disk", "nccl", "tensor"] = "auto"
    """disk: files in a shared folder; nccl: broadcasts, by gloo without GPUs; tensor: shared memory of one host; auto:
    nccl if the trainer and the servers have GPUs of their own, else disk (docs/weights.md)."""
    bucket_bytes: Count = 2**28
    """nccl and tensor: bytes sent at once; a larger tensor is sent by itself."""
    rendezvous_port: Port = 0
    """nccl: the trainer's port to which engines connect; 0: a free one."""
    folder: str = ""
    """Folder of versions as files (with nccl and tensor, only for servers that are behind); empty: a memory-backed one
    on this host if there is one, else in the run's folder."""
    full_every: Annotated[int, Field(ge=0)] = 0
    """disk: push only what changed since the version before, and the full weights every this many versions, for servers
    that join; pays if the folder is slow (docs/weights.md). 0: always the full weights."""
    relay_fan_out: Annotated[int, Field(ge=0, le=64)] = 0
    """disk: servers pass a version on over HTTP, each to at most this many others, and the trainer to as many, so that
    they share no folder; 2 is best for many servers (docs/weights.md). 0: each server reads `folder`."""
    local_folder: str = ""
    """With full_every or relay_fan_out: folder in which the trainer (full_every) and each rollout service keep the
    last versions, on their own host; empty: a memory-backed folder if there is room, else the host's temporary one."""
    rounding: Literal["auto", "dithered", "nearest"] = "auto"
    """How float32 becomes bfloat16. dithered: a fixed offset before truncation, which shows updates that nearest hides;
    nearest: as a trainer that computes in bfloat16 rounds; auto: the one that fits actor.dtype."""
    pause_mode: PauseMode = "retract"
    """What running requests do when new weights arrive. retract: continue with a KV cache that the new weights
    recompute. in_place: continue with the old KV cache. abort: end; the service re-sends the unfinished part, so no
    response spans two versions."""
    drain_seconds: Annotated[float, Field(ge=0)] = 0
    """Before a pause, let running groups finish for up to this long and take no new ones; pays if groups are short."""
    canary_tokens: Annotated[int, Field(ge=0, le=32)] = 16
    """Tokens of the canary: after each load, the server's log-probabilities of them must match the trainer's; 0: no
    canary, for an engine that is not a language model."""
    canary_tolerance: Annotated[float, Field(ge=0)] = 0
    """Largest mean absolute difference, in nats; 0: 0.002 if engine and trainer compute in float32, else 0.25."""
    checksums: bool = False
    """After each load, also compare the checksum of every tensor in the engine with the files that it came from; for
    engines on a CPU. Reads all weights twice while generation is paused."""
    push_timeout_seconds: Seconds = 120
    """A server that has not loaded a version after this long is fenced until it has."""

    @field_validator("canary_tokens")
    @classmethod
    def _one_token_says_nothing(cls, value: int) -> int:
        if value == 1:
            raise ValueError("expected 0 for none, or at least 2: the first token has no log-probability")
        return value

    @model_validator(mode="after")
    def _relays_full_files(self) -> "WeightsSection":
        if self.relay_fan_out and self.transport != "disk":
            raise ValueError(
                f"relay_fan_out {self.relay_fan_out} with transport {self.transport}: expected transport disk, the "
                "only one that servers pass on, or relay_fan_out 0"
            )
        if self.relay_fan_out and self.full_every:
            raise ValueError(
                f"relay_fan_out {self.relay_fan_out} with full_every {self.full_every}: expected one of them; servers "
                "pass full versions on, and deltas are read from a shared folder"
            )
        return self

    @model_validator(mode="after")
    def _deltas_are_files(self) -> "WeightsSection":
        if self.full_every and self.transport != "disk":
            raise ValueError(
                f"full_every {self.full_every} with transport {self.transport}: expected transport disk, the only one "
                "with deltas, or full_every 0"
            )
        return self


class RedisSection(Section):
    """The queue."""

    url: str = ""
    """redis://host:port of a Redis >= 6.2 or Valkey, rediss:// with TLS, or unix:///path; special characters of a
    password are percent-encoded. Empty: the launcher starts an embedded server."""
    password: SecretStr | None = None
    """Its password, if not in the URL."""
    timeout_seconds: Seconds = 30
    """A service exits if the queue is unreachable for longer than this."""

    @field_validator("url")
    @classmethod
    def _is_read_as_meant(cls, value: str) -> str:
        if value:
            check_queue_url(value)
        return value

    @field_validator("password")
    @classmethod
    def _can_be_passed_on(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_password(value.get_secret_value())
        return value


class LogSection(Section):
    """Logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""


class TrackingSection(Section):
    """Experiment trackers; `steps.jsonl` and `evals.jsonl` are always written, too (docs/tracking.md)."""

    to: tuple[Tracker, ...] = ()
    """Trackers that get curves; each needs the extra of its name, such as `pip install 'penstock[tensorboard]'`."""
    project: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")] = "penstock"
    """Project of W&B and trackio that the run belongs to."""
    wandb_entity: str = ""
    """User or team of W&B; empty: the account's default."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """offline: into the run's folder, for `wandb sync`; online: to W&B's server during the run."""
    close_seconds: Seconds = 30
    """Time to flush at the end; entries that are not written by then are dropped."""
    samples_per_step: Annotated[int, Field(ge=0, le=256)] = 8
    """Completions of each step for people to read, in `samples.jsonl` and trackers: one that failed, then whole groups,
    those with the widest rewards first. 0: none."""

    @field_validator("to", mode="before", json_schema_input_type=tuple[Tracker, ...] | Tracker)
    @classmethod
    def _one_name_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("to")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("expected each tracker once")
        return value

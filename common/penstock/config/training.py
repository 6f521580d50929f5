"""Sections of the configuration about training: run, model, optimizer, sampling, staleness, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from penstock.config.types import Count, Fraction, Seconds, Section, Urls
from penstock.contracts import Dtype
from penstock.contracts.generation import MOST_STOPS

StopStrings = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=MOST_STOPS)]
LOWEST_TEMPERATURE = 0.01  # SGLang samples greedily below 1e-6; before that, logits over it lose their float32 digits


class RunSection(Section):
    """The run: its name, its folder and its limits."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")] = "default"
    """Name of the run: its folder and its keys in Redis; runs that share a queue need different names. Letters, digits,
    `_`, `.` and `-`."""
    root: str = "runs"
    """Folder that holds one folder per run; trainer and launcher write logs, steps and checkpoints there."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Fixes the order of prompts and the sampling seed of every completion."""
    max_steps: Annotated[int, Field(ge=0)] = 0
    """Stop after this many steps; 0: only `total_train_epochs` ends the run."""
    stall_seconds: Seconds = 300
    """Without any progress for this long (with agents, `agent.timeout_seconds` longer), the trainer logs what it waits
    for and exits with code 3."""
    existing: Literal["resume", "replace", "refuse"] = "resume"
    """What to do with an earlier run of the same name: resume it, delete it (its folder, and its keys in the queue), or
    refuse to start. A run that lives is never touched."""


class LoraSection(Section):
    """LoRA: train W + (alpha / rank) B A with W frozen; needs `pip install 'penstock[lora]'`. See docs/lora.md."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of B A; 0: off, all weights are trained."""
    alpha: Count = 32
    """Numerator of the factor before B A."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers to adapt, by the endings of their names (`q_proj`); `all-linear`: all but the vocabulary's."""

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        if self.rank and not self.target_modules:
            raise ValueError(
                f"actor.lora.target_modules is empty and actor.lora.rank {self.rank}: expected all-linear or at least "
                "one name of a layer; set the latter to 0 to train all weights"
            )
        return self

    @property
    def described(self) -> str:
        """The adapter in words; empty if all weights are trained."""
        return f"rank {self.rank}, alpha {self.alpha}, target_modules {self.target_modules}" if self.rank else ""


class ActorSection(Section):
    """The policy that is trained."""

    path: str
    """Hugging Face folder or hub name of the model to train."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """G: completions per prompt."""
    dtype: Dtype = "bfloat16"
    """Compute type of forward and backward; master weights and optimizer are always float32."""
    max_tokens_per_micro_batch: Annotated[int, Field(ge=16)] = 4096
    """Tokens packed into one forward and backward pass."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    num_threads: Count = 1
    """CPU threads of the trainer's computation, if it trains on a CPU."""
    router_replay: bool = False
    """For mixtures of experts: the trainer routes each token through the experts that the engine routed it through, so
    that routes which rounding flips are no difference between sampler and trainer (R3). Costs layers x top-k bytes a
    token in the queue. The reference of the KL term routes for itself. See docs/models.md."""
    lora: LoraSection = LoraSection()
    """Low-rank adapters instead of all weights."""


class RefSection(Section):
    """The reference policy of the KL term; loaded only when `kl_ctl` > 0."""

    path: str = ""
    """Hugging Face folder or hub name; empty: `actor.path`. With LoRA, that is the policy without its adapter."""
    sync_steps: Annotated[int, Field(ge=0)] = 0
    """Updates between two moments at which the reference takes the policy's weights; 0: it never does. Not with LoRA
    (docs/objectives.md)."""
    mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the policy's weights then; the rest stays the reference's own (TR-DPO)."""

    @model_validator(mode="after")
    def _mixes_what_it_takes(self) -> Self:
        if self.mixup_alpha != 1 and not self.sync_steps:
            raise ValueError(
                f"ref.mixup_alpha is {self.mixup_alpha:g} with ref.sync_steps 0, with which the reference takes no "
                "weights to mix: expected mixup_alpha 1, or the updates between two mixtures in ref.sync_steps"
            )
        return self


class TeacherSection(Section):
    """On-policy distillation: the log-probabilities that a teacher gives to the tokens that the policy sampled are
    advantages of these tokens (docs/distillation.md)."""

    path: str = ""
    """Hugging Face folder or hub name of the teacher, which needs the tokenizer of `actor.path`; empty: none. The
    trainer loads it, as a reference."""
    urls: Urls = ()
    """SGLang servers of the teacher, instead of `path`: the reward service asks them, so that the trainer needs no
    memory for it. Several serve the same model, and share the groups. Somebody else starts them."""
    max_running_requests: Count = 64
    """Completions that a reward service asks of each server at once."""
    timeout_seconds: Seconds = 120
    """Longest time that a server may take for the completions of a group, its own queue included; a longer one counts
    as a failure of the server, and the group is asked again."""
    kl_ctl: Annotated[float, Field(gt=0)] = 1.0
    """Weight of log p_teacher - log p_policy in the advantage of a token: that of KL(policy, teacher)."""
    reward_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the rewards' advantages beside it; 0: the teacher alone, and rewards are only shown."""

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.path or self.urls)

    @property
    def named(self) -> str:
        """The key that names the teacher, with its value, for messages."""
        return f"teacher.path {self.path!r}" if self.path else f"teacher.urls {', '.join(self.urls)}"

    @model_validator(mode="after")
    def _weighs_what_it_has(self) -> Self:
        if self.path and self.urls:
            raise ValueError(
                f"teacher.path is {self.path!r} and teacher.urls {', '.join(self.urls)}: expected one "
                "of them, a model that the trainer loads or servers of it"
            )
        if self.teaches:
            return self
        for name, value in (("kl_ctl", self.kl_ctl), ("reward_weight", self.reward_weight)):
            if value != 1:
                raise ValueError(
                    f"teacher.{name} is {value:g} and there is no teacher: expected a model in teacher.path, servers "
                    f"of one in teacher.urls, or teacher.{name} 1"
                )
        return self


class OptimizerSection(Section):
    """AdamW and its learning-rate schedule."""

    lr: Annotated[float, Field(gt=0)] = 1e-6
    """Learning rate after warm-up."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises linearly to `lr`."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after warm-up."""
    decay_steps: Annotated[int, Field(ge=0)] = 0
    """Steps, warm-up included, after which the rate has fallen to `min_lr_ratio * lr`; 0: those of the run."""
    min_lr_ratio: Fraction = 0.0
    """Share of `lr` that is left at the end of the decay."""
    ess_base: Fraction = 0.0
    """Scale the rate by sqrt(min(1, ess / ess_base)); ess is the batch's effective sample size ratio (VCPO); 0: off."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this global L2 norm."""
    max_non_finite_steps: Count = 5
    """This many steps in a row whose loss or gradient is not finite end the run (exit code 8); each is counted, and
    changes no weights."""

    @model_validator(mode="after")
    def _falls_after_warm_up(self) -> Self:
        if self.schedule != "constant" and 0 < self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"optimizer.decay_steps is {self.decay_steps} and optimizer.warmup_steps {self.warmup_steps}: expected "
                f"a {self.schedule} schedule to have steps left to fall after the warm-up, which decay_steps includes; "
                "raise decay_steps, or set it to 0 for the steps of the run"
            )
        return self


class SamplingSection(Section):
    """How training completions are sampled."""

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Softmax temperature, at least 0.01; log-probabilities are taken after it."""
    max_new_tokens: Count = 256
    """Longest completion, in tokens."""
    stop: StopStrings = ()
    """Strings that end a completion as soon as its text has one: `"\\n"` ends it at the token of two newlines too.
    Their tokens are trained, their text is not scored. In runs of episodes, each must be exactly one token. The
    end-of-text token ends a completion too."""
    ignore_eos: bool = False
    """The end-of-text token does not end a completion: only `stop` and `max_new_tokens` do. Not for episodes."""

    @model_validator(mode="after")
    def _samples(self) -> Self:
        if self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"sampling.temperature is {self.temperature}: expected at least {LOWEST_TEMPERATURE}. An engine takes "
                "less for greedy, and reports log-probabilities at temperature 1; and a group of equal completions has "
                "no gradient"
            )
        return self


class StalenessSection(Section):
    """How old the policy that generates may be."""

    max_staleness: Annotated[int, Field(ge=0)] = 1
    """Largest difference, in versions, between the weights that are updated and those that generated a token."""
    order: Literal["ticket", "ready"] = "ticket"
    """`ticket`: batches are prefixes of the tickets; nothing is dropped as stale, no bias against long answers.
    `ready`: batches are the oldest groups that have arrived. See docs/staleness.md."""
    on_stale: Literal["drop", "mask"] = "drop"
    """Order ready: if a group has tokens older than `max_staleness` when its batch is made, drop and replace it, or
    train it without these tokens. In order ticket, its ticket is issued again."""
    straggler_seconds: Seconds = 60
    """Log a ticket if it alone has held up a batch for this long, and again after each further such time."""
    max_deliveries: Count = 3
    """A ticket whose work was reported as failed this often is dropped as poison."""
    claim_idle_seconds: Seconds = 60
    """Work goes to another worker if its holder is alive but has not renewed it for this long."""
    heartbeat_seconds: Seconds = 10
    """A worker without a heartbeat for this long is dead, and its work is free."""

    @model_validator(mode="after")
    def _masks_only_in_ready_order(self) -> Self:
        if self.order == "ticket" and self.on_stale == "mask":
            raise ValueError(
                "staleness.on_stale is mask with staleness.order ticket, which never trains a stale group: its ticket "
                "is issued again. Expected on_stale drop (the default), or set staleness.order to ready"
            )
        return self

    @property
    def max_lag(self) -> int | None:
        """Largest staleness of a trained token; older tokens are masked. None: no token is masked."""
        return self.max_staleness if self.on_stale == "mask" else None


class CheckpointSection(Section):
    """Checkpoints and step files."""

    every_steps: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints; 0: only the last. A restart replays the steps after the newest one."""
    keep: Count = 2
    """Checkpoints kept."""
    keep_best: bool = False
    """Also keep the checkpoint of the best evaluated weights (`eval.best_metric`): the state after each evaluated step
    is written, and new weights are pushed after their evaluation has ended. See docs/evaluation.md."""
    keep_step_bytes: Annotated[int, Field(ge=0)] = 2**30
    """Recorded steps are kept up to this many bytes, and never past the oldest kept checkpoint."""

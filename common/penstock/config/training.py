"""Sections of the configuration about training: run, model, optimizer, sampling, staleness, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from penstock.config.types import Count, Fraction, Seconds, Section
from penstock.contracts import Dtype
from penstock.contracts.generation import MOST_STOPS

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
    lora: LoraSection = LoraSection()
    """Low-rank adapters instead of all weights."""


class RefSection(Section):
    """The frozen reference policy of the KL term; loaded only when `kl_ctl` > 0."""

    path: str = ""
    """Hugging Face folder or hub name; empty: `actor.path`. With LoRA, that is the policy without its adapter."""


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
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=MOST_STOPS)] = ()
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


class EvalSection(Section):
    """Evaluation on held-out prompts during training."""

    every_steps: Annotated[int, Field(ge=0)] = 10
    """Evaluate each version that is a multiple of this; 0: only at start and end."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy."""
    samples_per_prompt: Count = 1
    """Completions of each held-out prompt: accuracy is then mean@k, the mean over prompts of the share that is right,
    and pass@k the chance that one of k is. More than 1 needs a temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that together have this probability; 1: from all."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many most likely tokens; 0: from all."""
    min_p: Fraction = 0.0
    """Sample from tokens that are at least this share as likely as the most likely one; 0: from all."""
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Logits of tokens that the completion has already are divided by it, negative ones multiplied; 1: they are not."""
    max_share: Fraction = 0.25
    """Share of a server's running requests that evaluation may take while training tickets wait."""
    num_shown: Annotated[int, Field(ge=0)] = 4
    """Completions printed at the start and at the end."""
    success: float = 1.0
    """A completion counts as accurate when its reward is at least this. One whose reward failed is in no mean."""

    @model_validator(mode="after")
    def _draws_what_differs(self) -> Self:
        if self.samples_per_prompt > 1 and not self.temperature:
            raise ValueError(
                f"eval.samples_per_prompt is {self.samples_per_prompt} with eval.temperature 0, which makes all "
                "completions of a prompt equal: expected a temperature above 0, or one sample"
            )
        return self

    @model_validator(mode="after")
    def _filters_what_is_sampled(self) -> Self:
        filters = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        if used := [name for name, is_used in filters.items() if is_used and not self.temperature]:
            raise ValueError(
                f"eval.{used[0]} is {getattr(self, used[0]):g} with eval.temperature 0, which always takes the most "
                f"likely token: expected a temperature above 0, or eval.{used[0]} at its default"
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
    keep_step_bytes: Annotated[int, Field(ge=0)] = 2**30
    """Recorded steps are kept up to this many bytes, and never past the oldest kept checkpoint."""

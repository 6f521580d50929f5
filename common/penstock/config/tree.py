"""The configuration tree: every key, its type, its default and its meaning.

Owns the tree and the rules between keys; `penstock.config.load` reads the values. The names of AReaL's
GRPO page are literal keys: actor.path, actor.group_size, ref.path, kl_ctl, total_train_epochs, optimizer.lr.
docs/configuration.md is generated from the docstrings of the sections.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from penstock.config.agent import AgentSection
from penstock.config.data import DataSection, TrainSetSection
from penstock.config.evaluation import EvalSection, HeldOutSet, held_out_sets
from penstock.config.loss import LossSection
from penstock.config.ray import RaySection
from penstock.config.secrets import check_token
from penstock.config.services import (
    LogSection,
    RedisSection,
    RewardSection,
    RolloutSection,
    TrackingSection,
    TrainerSection,
    WeightsSection,
)
from penstock.config.slurm import SlurmSection
from penstock.config.training import (
    ActorSection,
    CheckpointSection,
    OptimizerSection,
    RefSection,
    RunSection,
    SamplingSection,
    StalenessSection,
    TeacherSection,
)
from penstock.config.types import Count, Section
from penstock.contracts import Rounding, ServiceKind
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD
from penstock.engine_limits import longest_sequence

LARGEST_REWARD = 1e12  # after reward.scale, as the bound of reward.max_magnitude


class Config(Section):
    """The full configuration."""

    run: RunSection = RunSection()
    """The run."""
    actor: ActorSection
    """The policy."""
    ref: RefSection = RefSection()
    """The reference policy."""
    kl_ctl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence from the reference policy in the loss."""
    teacher: TeacherSection = TeacherSection()
    """The teacher."""
    total_train_epochs: Count = 1
    """Passes over the training prompts; of several sets (`data.train_sets`), as many draws as they have prompts
    together count as one."""
    optimizer: OptimizerSection = OptimizerSection()
    """The optimizer."""
    loss: LossSection = LossSection()
    """The objective."""
    sampling: SamplingSection = SamplingSection()
    """Sampling."""
    data: DataSection = DataSection()
    """Prompts."""
    eval: EvalSection = EvalSection()
    """Evaluation."""
    staleness: StalenessSection = StalenessSection()
    """Staleness and redelivery."""
    rollout: RolloutSection = RolloutSection()
    """Rollout service and engine."""
    agent: AgentSection = AgentSection()
    """Agent service and environment."""
    reward: RewardSection = RewardSection()
    """Reward service."""
    trainer: TrainerSection = TrainerSection()
    """Trainer service."""
    weights: WeightsSection = WeightsSection()
    """Weight pushes."""
    redis: RedisSection = RedisSection()
    """Queue."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Checkpoints."""
    log: LogSection = LogSection()
    """Logs."""
    tracking: TrackingSection = TrackingSection()
    """Experiment trackers."""
    slurm: SlurmSection = SlurmSection()
    """Slurm launcher."""
    ray: RaySection = RaySection()
    """Ray cluster."""
    token: SecretStr | None = None
    """Bearer token for all requests that change state or run rewards (PENSTOCK_TOKEN), of visible ASCII characters;
    without it they are open."""

    @field_validator("token")
    @classmethod
    def _fits_into_a_header(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            check_token(value.get_secret_value())
        return value

    @model_validator(mode="before")
    @classmethod
    def _score_of_the_environment(cls, given: Any) -> Any:
        """With agents, and without `reward.functions`, the environment's score is the reward."""
        agent, reward = (given.get(key, {}) for key in ("agent", "reward")) if isinstance(given, dict) else ({}, {})
        has_agent = isinstance(agent, dict) and (agent.get("environment") or agent.get("command"))
        if has_agent and isinstance(reward, dict) and "functions" not in reward:
            return {**given, "reward": {**reward, "functions": {ENVIRONMENT_REWARD: 1.0}}}
        return given

    @property
    def _why_no_function_of_its_own(self) -> str | None:
        """The reason why reward functions cannot have advantages of their own; None if they can, or have none."""
        functions = self.loss.advantage.by_function
        unknown = [name for name in functions if not self.reward.functions.get(name)]
        if unknown:
            return (
                f"loss.advantage.by_function names {', '.join(unknown)}: expected functions of reward.functions with a "
                f"weight other than 0 ({', '.join(self.reward.functions)})"
            )
        if functions and self.reward.gates:
            return (
                f"reward.gates has {', '.join(self.reward.gates)} with loss.advantage.by_function, which does not sum: "
                "expected one of them"
            )
        return None

    @property
    def _why_no_reward_scale(self) -> str | None:
        """The reason why rewards cannot be scaled or clipped as configured; None if they can, or are not."""
        scale, clip, advantage = self.reward.scale, self.reward.clip, self.loss.advantage
        if advantage.by_function and (scale != 1 or clip is not None):
            key, value = ("scale", f"{scale:g}") if scale != 1 else ("clip", f"{clip}")
            return (
                f"reward.{key} is {value} with loss.advantage.by_function, whose advantages are not made of the sum: "
                "expected reward.scale 1 and reward.clip null; the weights of by_function scale each function"
            )
        if clip is None and scale * self.reward.max_magnitude > LARGEST_REWARD:
            return (
                f"reward.scale is {scale:g} with reward.max_magnitude {self.reward.max_magnitude:g}: expected a "
                f"product of at most {LARGEST_REWARD:g}, since the trainer squares rewards; lower one of both, or set "
                "reward.clip"
            )
        if scale != 1 and clip is None and self._divides_the_scale_away:
            divisor = f"loss.advantage.scale {advantage.scale}"
            if advantage.scale == "none":
                divisor = f"loss.advantage.whitening {advantage.whitening}"
            return (
                f"reward.scale is {scale:g} with {divisor}, which divides it away again, and nothing else here depends "
                "on the size of a reward: expected reward.scale 1, loss.advantage.scale none without whitening, or "
                "bounds in reward.clip"
            )
        return None

    @property
    def _why_no_moving_reference(self) -> str | None:
        """The reason why the reference cannot follow the policy; None if it can, or does not."""
        steps = self.ref.sync_steps
        if steps and not self.kl_ctl:
            return (
                f"ref.sync_steps is {steps} with kl_ctl 0, with which there is no reference: expected ref.sync_steps "
                "0, or the weight of the KL term in kl_ctl"
            )
        if steps and self.actor.lora.rank:
            return (
                f"ref.sync_steps is {steps} with actor.lora.rank {self.actor.lora.rank}: the reference is the base "
                "without its adapter, or a full model, and neither can take an adapter's weights; expected "
                "ref.sync_steps 0, or actor.lora.rank 0"
            )
        return None

    @property
    def _why_no_teacher(self) -> str | None:
        """The reason why no teacher can teach as configured; None if it can, or there is none."""
        teacher = self.teacher
        if teacher.teaches and self.loss.dynamic_sampling:
            return (
                f"loss.dynamic_sampling is true with {teacher.named}: the teacher gives groups of equal rewards a "
                "gradient, and dropping them would be a bias. Expected loss.dynamic_sampling false, or no teacher"
            )
        if teacher.teaches and not teacher.reward_weight and self.kl_ctl and self.loss.kl.place == "reward":
            return (
                f"teacher.reward_weight is 0 with kl_ctl {self.kl_ctl:g} and loss.kl.place reward: the KL term would "
                "be weighted by 0 too. Expected loss.kl.place loss, kl_ctl 0, or another teacher.reward_weight"
            )
        if teacher.urls and self.sampling.temperature != 1:
            return (
                f"sampling.temperature is {self.sampling.temperature:g} with {teacher.named}: servers give "
                "log-probabilities at temperature 1 only, and a teacher and its policy need the same. Expected "
                "sampling.temperature 1, or the teacher in teacher.path"
            )
        return None

    @property
    def _divides_the_scale_away(self) -> bool:
        """Whether advantages are the same for rewards of any size."""
        loss = self.loss
        depends = (
            loss.advantage.function,
            loss.advantage.tolerance,
            loss.overlong.buffer_tokens,
            loss.truncated == "penalty",
            self.kl_ctl and loss.kl.place == "reward",
        )
        return (loss.advantage.scale != "none" or loss.advantage.whitening != "none") and not any(depends)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if not self.agent.enabled and self.actor.group_size > self.rollout.engine.max_running_requests:
            raise ValueError(
                f"actor.group_size is {self.actor.group_size} and rollout.engine.max_running_requests "
                f"{self.rollout.engine.max_running_requests}: expected a server to hold a full group; raise the latter"
            )
        if self.loss.num_minibatches > self.data.batch_size:
            raise ValueError(
                f"loss.num_minibatches is {self.loss.num_minibatches} and data.batch_size {self.data.batch_size}: "
                "expected at least one group each; lower the former"
            )
        for reason in (
            self.loss.unsafe_off_policy(self.staleness.max_staleness),
            self.loss.drops_gradients(self.kl_ctl),
            self._why_no_function_of_its_own,
            self._why_no_reward_scale,
            self._why_no_moving_reference,
            self._why_no_teacher,
            self._why_no_curriculum,
        ):
            if reason:
                raise ValueError(reason)
        if self.loss.overlong.buffer_tokens > self.sampling.max_new_tokens:
            raise ValueError(
                f"loss.overlong.buffer_tokens is {self.loss.overlong.buffer_tokens} and sampling.max_new_tokens "
                f"{self.sampling.max_new_tokens}: expected a buffer within the completion; lower the former"
            )
        if self.loss.truncated == "leave_out" and self.sampling.ignore_eos and not self.sampling.stop:
            raise ValueError(
                "loss.truncated is leave_out with sampling.ignore_eos true and no sampling.stop: every completion "
                "would be truncated, and nothing trained; expected strings in sampling.stop, or loss.truncated train"
            )
        if reason := self._why_no_episodes:
            raise ValueError(reason)
        if self._hides_small_updates and self.rollout.engine.dtype == "float32":
            raise ValueError(
                "actor.dtype is bfloat16 and rollout.engine.dtype float32: the engine would sample with updates that "
                "the trainer's rounded weights do not show yet; expected one type, or actor.dtype float32"
            )
        if self._hides_small_updates and self.weights.rounding == "dithered":
            raise ValueError(
                "weights.rounding is dithered and actor.dtype bfloat16: the trainer computes with weights rounded to "
                "nearest, and the engine would sample with others; expected rounding auto, or actor.dtype float32"
            )
        if self.trainer.take_turns and (reason := self._why_no_turns):
            raise ValueError(f"trainer.take_turns is on and {reason}")
        if not self.reward.functions:
            raise ValueError("reward.functions is empty: expected at least one function and its weight")
        if not self.data.train_sets and not self.data.train.path:
            raise ValueError("data.train.path is empty: expected a JSONL file, a dataset or a reasoning-gym task")
        if reason := self._why_no_evaluation:
            raise ValueError(reason)
        return self

    @property
    def held_out_sets(self) -> tuple[HeldOutSet, ...]:
        """The sets of held-out prompts, the main one first; none without `data.eval`."""
        return held_out_sets(self.data, self.eval)

    @property
    def longest_completions(self) -> dict[str, int]:
        """The longest completion of training and of each held-out set with a length of its own, by key, in tokens."""
        own = {f"{each.sampling_key}.max_new_tokens": each.sampling.max_new_tokens for each in self.held_out_sets}
        return {"sampling.max_new_tokens": self.sampling.max_new_tokens} | {key: n for key, n in own.items() if n}

    @property
    def own_functions(self) -> dict[str, dict[str, float]]:
        """The reward functions of held-out sets that have their own, by what their tickets name as reward."""
        return {each.reward: each.functions for each in self.held_out_sets if each.functions}

    @property
    def all_rewards(self) -> RewardSection:
        """The section `reward` with the functions of held-out sets, too: weight 0, as for rows that name them."""
        functions = dict(self.reward.functions)
        for own in self.own_functions.values():
            for name in own:
                functions.setdefault(name, 0.0)
        return self.reward.model_copy(update={"functions": functions})

    @property
    def _why_no_evaluation(self) -> str:
        """What keeps held-out sets from being evaluated as configured; empty if nothing does."""
        if self.eval.sets and self.data.eval is None:
            return (
                f"eval.sets has {', '.join(self.eval.sets)} and data.eval is not set: expected the main set there, "
                "whose accuracy is that of the run; move one of them to data.eval"
            )
        uses = {"checkpoint.keep_best": self.checkpoint.keep_best, "eval.patience": self.eval.patience}
        if used := [key for key, value in uses.items() if value]:
            if self.data.eval is None:
                return (
                    f"{used[0]} is set and data.eval is not: expected held-out prompts, by which weights are compared"
                )
            if not self.eval.every_steps:
                return (
                    f"{used[0]} is set and eval.every_steps is 0, which evaluates only at start and end: expected more "
                    "evaluations to compare"
                )
        names = [each.name for each in self.held_out_sets]
        if names and self.eval.best_set not in names:
            return f"eval.best_set is {self.eval.best_set!r}: expected {' or '.join(names)}, the sets of this run"
        return next(filter(None, (each.problem(self.agent) for each in self.held_out_sets)), "")

    @property
    def _why_no_curriculum(self) -> str | None:
        """What keeps draws from depending on steps alone; None if nothing does, or there is no curriculum."""
        curriculum, staleness = self.data.curriculum, self.staleness
        if curriculum.priority == "none":
            return None
        if staleness.order == "ready":
            return (
                f"data.curriculum.priority is {curriculum.priority} with staleness.order ready, in which time decides "
                "what a step trains, and so would decide draws: expected staleness.order ticket"
            )
        if curriculum.delay_steps < staleness.max_staleness:
            return (
                f"data.curriculum.delay_steps is {curriculum.delay_steps} and staleness.max_staleness "
                f"{staleness.max_staleness}: expected at least as many, since tickets are issued that many steps "
                "ahead; raise the former"
            )
        return None

    @property
    def stall_seconds(self) -> float:
        """How long a run may be without any progress: an episode may take its time, and is progress when it ends."""
        return self.run.stall_seconds + (self.agent.timeout_seconds if self.agent.enabled else 0.0)

    @property
    def _why_no_turns(self) -> str:
        """What keeps trainer and engines from taking turns on GPUs; empty if nothing does."""
        if self.staleness.max_staleness > 1:
            return (
                f"staleness.max_staleness {self.staleness.max_staleness}: nothing is generated in the trainer's turn, "
                "so that more than 1 only makes tokens older; expected 0 or 1"
            )
        if self.weights.pause_mode == "in_place":
            return (
                "weights.pause_mode in_place, which keeps the key-value cache: an engine gives its cache up in the "
                "trainer's turn; expected retract or abort"
            )
        if self.weights.transport not in ("auto", "disk"):
            return (
                f"weights.transport {self.weights.transport}: expected disk, or auto, which is disk then; the other "
                "transports send while both sides have their GPU memory"
            )
        if self.trainer.num_ranks > 1:
            return (
                f"trainer.num_ranks {self.trainer.num_ranks}: expected 1; sharded weights cannot leave the GPUs yet. "
                "Let trainer and engines have GPUs of their own, or train with one rank"
            )
        if self.rollout.engine.url:
            return (
                "rollout.engine.url is set: expected engines that the rollout services start; one that does not give "
                "up its GPU memory must be killed"
            )
        return ""

    @property
    def _why_no_episodes(self) -> str:
        """What keeps episodes from being made or trained as configured; empty if nothing does."""
        if not self.agent.enabled:
            if ENVIRONMENT_REWARD not in self.reward.functions:
                return ""
            return (
                f"reward.functions has {ENVIRONMENT_REWARD!r}, the score of an agent's environment, and neither "
                "agent.environment nor agent.command is set: expected one of them, or other reward functions"
            )
        if self.sampling.max_new_tokens >= self.agent.max_tokens:
            return (
                f"sampling.max_new_tokens is {self.sampling.max_new_tokens} and agent.max_tokens "
                f"{self.agent.max_tokens}: the latter is for all turns with what is between them; expected answers "
                "that leave room for a prompt; lower the former, or raise the latter"
            )
        engine = self.rollout.engine
        for key, tokens in (("context_length", engine.context_length), ("max_total_tokens", engine.max_total_tokens)):
            if tokens and self.agent.max_tokens > (longest := longest_sequence(tokens, None)):
                return (
                    f"agent.max_tokens is {self.agent.max_tokens} and rollout.engine.{key} {tokens}: expected at most "
                    f"{longest}, the longest sequence that such an engine generates to its end; lower the former, or "
                    "raise the latter"
                )
        meaningless = self._meaningless_for_episodes
        key = "agent.environment" if self.agent.environment else "agent.command"
        return meaningless and f"{key} is set and {meaningless}"

    @property
    def _meaningless_for_episodes(self) -> str:
        """What of the rest has no meaning for episodes; empty if nothing does."""
        if self.loss.overlong.buffer_tokens:
            return (
                f"loss.overlong.buffer_tokens {self.loss.overlong.buffer_tokens}, which is for completions that come "
                "close to sampling.max_new_tokens: an episode ends at agent.max_turns or agent.max_tokens, and what it "
                "is worth then is its environment's to say (get_reward), or agent.cut_score; expected 0"
            )
        if self.actor.router_replay:
            return (
                "actor.router_replay true: the calls of an episode do not record the experts of their tokens; expected "
                "false"
            )
        if self.sampling.ignore_eos:
            return (
                "sampling.ignore_eos true: a turn of an episode ends where the chat template ends a message; expected "
                "false"
            )
        if self.loss.reshapes_truncated:
            return (
                f"loss.truncated {self.loss.truncated}, which changes the reward of a completion that reached "
                "sampling.max_new_tokens: what a cut episode is worth is its environment's to say (get_reward), or "
                "agent.cut_score; expected train or leave_out"
            )
        if self.loss.aggregation == "token-sum-norm" and not self.loss.norm_length:
            return (
                "loss.aggregation token-sum-norm with loss.norm_length 0, which is sampling.max_new_tokens then: "
                "the limit of one turn. Expected a constant length of an episode; set loss.norm_length, for example "
                f"to {self.agent.max_tokens} (agent.max_tokens)"
            )
        if self.data.too_long != "error":
            return (
                f"data.too_long {self.data.too_long}: the tokens of an episode's prompt are unknown before it begins, "
                "and agent.max_tokens ends it; expected error, the default"
            )
        sections: list[tuple[str, DataSection | TrainSetSection]] = [("data", self.data)]
        for key, section in sections + [(each.key, each.section) for each in self.data.training_sets]:
            if section.template_options:
                return (
                    f"{key}.template_options holds {', '.join(section.template_options)}: the agent service renders "
                    "messages, with the defaults of the chat template; expected no options"
                )
            if section.prompt_template:
                return (
                    f"{key}.prompt_template is set: the agent service renders messages, and an environment says what "
                    f"it asks (reset); expected no template. {key}.system_prompt can hold an instruction"
                )
        return ""

    @property
    def rounding(self) -> Rounding:
        """How pushed weights become bfloat16: engine and trainer must compute with the same policy."""
        if self.weights.rounding == "auto":
            return "nearest" if self._hides_small_updates else "dithered"
        return self.weights.rounding

    @property
    def _hides_small_updates(self) -> bool:
        """Whether the trainer's forward pass rounds trained weights to nearest; an adapter is computed separately."""
        return self.actor.dtype == "bfloat16" and not self.actor.lora.rank

    def transport_from(self, device: str) -> Literal["disk", "nccl", "tensor"]:
        """`weights.transport`, with `auto` resolved for a trainer on `device` (cpu or cuda).

        NCCL connects neither two processes on one GPU nor instances of MIG, and on one host files in memory do as well.
        Only files reach an engine that has given its GPU up.
        """
        if self.trainer.take_turns:
            return "disk"
        if self.weights.transport != "auto":
            return self.weights.transport
        trainer, servers = self.trainer.gpus, self.rollout.gpus
        if trainer and servers:
            apart = not {*trainer} & {*servers} and not any(name.startswith("MIG-") for name in (*trainer, *servers))
        else:
            apart = not _is_loopback(self.trainer.host)
        return "nccl" if device == "cuda" and apart else "disk"

    @property
    def num_services(self) -> dict[ServiceKind, int]:
        """How many services of each kind the run has; a kind that it has none of is not there."""
        return {
            ServiceKind.ROLLOUT: self.rollout.num_servers,
            **({ServiceKind.AGENT: self.agent.num_services} if self.agent.enabled else {}),
            ServiceKind.REWARD: self.reward.num_services,
            ServiceKind.TRAINER: 1,
        }

    @property
    def max_outstanding(self) -> int:
        """Credits: the most tickets that may be outstanding, (max_staleness + 1) * B."""
        return (self.staleness.max_staleness + 1) * self.data.batch_size


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")

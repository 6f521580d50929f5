"""Sections of the configuration about evaluation: how held-out prompts are sampled, and sets of them by name.

Owns what holds for each set. The main set is `data.eval`, sampled as `eval` says; each further set in `eval.sets` says
only in what it differs. Invariant: a set that comes out of `Config.held_out_sets` leaves nothing open.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from penstock.config.agent import AgentSection
from penstock.config.data import DataSection, DatasetSection, PromptTemplate, SetName
from penstock.config.training import StopStrings
from penstock.config.types import Count, Fraction, Section
from penstock.contracts.vocabulary import ENVIRONMENT_REWARD, MAIN_SET

Temperature = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Amount = Annotated[int, Field(ge=0)]
Penalty = Annotated[float, Field(gt=0, le=2)]


class EvalSampling(Section):
    """How completions of held-out prompts are sampled and judged."""

    temperature: Temperature = 0.0
    """0 is greedy."""
    samples_per_prompt: Count = 1
    """Completions of each held-out prompt: accuracy is then mean@k, the mean over prompts of the share that is right,
    and pass@k the chance that one of k is. More than 1 needs a temperature."""
    max_new_tokens: Amount = 0
    """Longest completion of a held-out prompt, in tokens; 0: `sampling.max_new_tokens`."""
    stop: StopStrings | None = None
    """Strings that end a completion of a held-out prompt; none: those of `sampling.stop`."""
    top_p: Share = 1.0
    """Sample from the most likely tokens that together have this probability; 1: from all."""
    top_k: Amount = 0
    """Sample from this many most likely tokens; 0: from all."""
    min_p: Fraction = 0.0
    """Sample from tokens that are at least this share as likely as the most likely one; 0: from all."""
    repetition_penalty: Penalty = 1.0
    """Logits of tokens that the completion has already are divided by it, negative ones multiplied; 1: they are not."""
    success: float = 1.0
    """A completion counts as accurate when its reward is at least this. One whose reward failed is in no mean. In
    training, a run all of whose completions reach it is solved: see docs/evaluation.md."""

    def problem(self, key: str) -> str:
        """What keeps completions from being sampled so; empty if nothing does. key: of the section, for the message."""
        if self.temperature:
            return ""
        if self.samples_per_prompt > 1:
            return (
                f"{key}.samples_per_prompt is {self.samples_per_prompt} with {key}.temperature 0, which makes all "
                "completions of a prompt equal: expected a temperature above 0, or one sample"
            )
        filters = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        if used := [name for name, is_used in filters.items() if is_used]:
            return (
                f"{key}.{used[0]} is {getattr(self, used[0]):g} with {key}.temperature 0, which always takes the most "
                f"likely token: expected a temperature above 0, or {key}.{used[0]} at its default"
            )
        return ""


class EvalSetSection(DatasetSection):
    """One further set of held-out prompts. A key that it leaves out is that of `eval`, `data` or `reward`."""

    system_prompt: str | None = None
    """System message before every prompt; none: `data.system_prompt`."""
    prompt_template: PromptTemplate | None = None
    """Text around each prompt that is plain text; none: `data.prompt_template`."""
    functions: dict[str, float] = Field(default={})
    """Weighted sum of reward functions; empty: `reward.functions`. A row that names its reward keeps it."""
    temperature: Temperature | None = None
    """0 is greedy; none: `eval.temperature`."""
    samples_per_prompt: Count | None = None
    """Completions of each prompt; none: `eval.samples_per_prompt`."""
    max_new_tokens: Amount | None = None
    """Longest completion, in tokens; 0: `sampling.max_new_tokens`; none: `eval.max_new_tokens`."""
    stop: StopStrings | None = None
    """Strings that end a completion; none: `eval.stop`."""
    top_p: Share | None = None
    """As `eval.top_p`, which holds if there is none."""
    top_k: Amount | None = None
    """As `eval.top_k`, which holds if there is none."""
    min_p: Fraction | None = None
    """As `eval.min_p`, which holds if there is none."""
    repetition_penalty: Penalty | None = None
    """As `eval.repetition_penalty`, which holds if there is none."""
    success: float | None = None
    """A completion counts as accurate when its reward is at least this; none: `eval.success`."""

    @model_validator(mode="after")
    def _can_be_scored(self) -> Self:
        if self.functions and not any(self.functions.values()):
            raise ValueError(
                f"functions holds {', '.join(self.functions)}, each with weight 0: expected one with another weight, "
                "or no functions for those of reward.functions"
            )
        return self

    def sampled(self, default: EvalSampling) -> EvalSampling:
        """How this set is sampled, with `default` for what it leaves out."""
        own = {name: getattr(self, name) for name in EvalSampling.model_fields}
        values = {name: getattr(default, name) if value is None else value for name, value in own.items()}
        return EvalSampling.model_validate(values)

    @property
    def dataset(self) -> DatasetSection:
        """Where its rows come from."""
        return DatasetSection.model_validate({name: getattr(self, name) for name in DatasetSection.model_fields})


class EvalSection(EvalSampling):
    """Evaluation on held-out prompts during training."""

    every_steps: Annotated[int, Field(ge=0)] = 10
    """Evaluate each version that is a multiple of this; 0: only at start and end."""
    sets: dict[SetName, EvalSetSection] = Field(default={})
    """Further sets of held-out prompts beside `data.eval`, by name: each with data of its own, and with its own reward
    functions and sampling where they differ. See docs/evaluation.md."""
    best_metric: Literal["accuracy", "reward"] = "accuracy"
    """The figure by which evaluations are compared, for `checkpoint.keep_best` and `patience`: the accuracy, or the
    mean reward."""
    best_set: str = MAIN_SET
    """The set whose figure that is: `main`, which is `data.eval`, or one of `sets`."""
    patience: Amount = 0
    """After this many evaluations in a row without a better one, the run ends as if it had trained all; 0: never."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """For `patience`, better is what exceeds the best figure before by more than this."""
    max_share: Fraction = 0.25
    """Share of a server's running requests that evaluation may take while training tickets wait."""
    num_shown: Annotated[int, Field(ge=0)] = 4
    """Completions printed at the start and at the end."""

    @model_validator(mode="after")
    def _sets_have_names(self) -> Self:
        if MAIN_SET in self.sets:
            raise ValueError(
                f"eval.sets has a set {MAIN_SET!r}, which is the name of data.eval: expected another name for it"
            )
        return self

    @model_validator(mode="after")
    def _samples(self) -> Self:
        sampled = {"eval": self.main, **{f"eval.sets.{name}": each.sampled(self) for name, each in self.sets.items()}}
        for key, sampling in sampled.items():
            if problem := sampling.problem(key):
                raise ValueError(problem)
        return self

    @property
    def main(self) -> EvalSampling:
        """How the main set is sampled."""
        return EvalSampling.model_validate({name: getattr(self, name) for name in EvalSampling.model_fields})


class HeldOutSet(Section):
    """A set of held-out prompts with all that holds for it. key: its section in the configuration."""

    name: str
    key: str
    dataset: DatasetSection
    sampling: EvalSampling
    system_prompt: str
    prompt_template: str
    functions: dict[str, float]
    """Of its own; empty: `reward.functions`."""

    @property
    def sampling_key(self) -> str:
        """The section that says how it is sampled."""
        return "eval" if self.name == MAIN_SET else self.key

    @property
    def functions_key(self) -> str:
        """The mapping whose functions score it."""
        return f"{self.key}.functions" if self.functions else "reward.functions"

    @property
    def reward(self) -> str:
        """What a ticket of a row without a reward of its own names: its functions, by their key."""
        return self.key if self.functions else ""

    def problem(self, agent: AgentSection) -> str:
        """What keeps it from being evaluated in a run with these agents, or without; empty if nothing does."""
        if not agent.enabled:
            return self._problem_without_agents()
        if self.sampling.max_new_tokens >= agent.max_tokens:
            return (
                f"{self.sampling_key}.max_new_tokens is {self.sampling.max_new_tokens} and agent.max_tokens "
                f"{agent.max_tokens}: the latter is for all turns with what is between them; expected answers "
                "that leave room for a prompt; lower the former, or raise the latter"
            )
        if self.sampling.stop is not None:
            return (
                f"{self.sampling_key}.stop is set: turns of an episode end as in training; expected no strings of "
                "its own; set sampling.stop"
            )
        if self.prompt_template:
            return (
                f"{self.key}.prompt_template is set: the agent service renders messages, and an environment says "
                "what it asks (reset); expected no template"
            )
        return ""

    def _problem_without_agents(self) -> str:
        if ENVIRONMENT_REWARD in self.functions:
            return (
                f"{self.key}.functions has {ENVIRONMENT_REWARD!r}, the score of an agent's environment, and "
                "neither agent.environment nor agent.command is set: expected other functions"
            )
        if self.functions and self.dataset.kind == "reasoning_gym":
            return (
                f"{self.key}.functions has {', '.join(self.functions)} with {self.key}.kind reasoning_gym, whose "
                "rows name their task's own reward: expected no functions"
            )
        return ""


def held_out_sets(data: DataSection, section: EvalSection) -> tuple[HeldOutSet, ...]:
    """The sets of a run, the main one first; none without `data.eval`."""
    if data.eval is None:
        return ()
    prompts = {"system_prompt": data.system_prompt, "prompt_template": data.prompt_template}
    main = HeldOutSet(name=MAIN_SET, key="data.eval", dataset=data.eval, sampling=section.main, functions={}, **prompts)
    return (main, *(_further(name, each, section, prompts) for name, each in section.sets.items()))


def _further(name: str, given: EvalSetSection, section: EvalSection, prompts: dict[str, str]) -> HeldOutSet:
    own = {key: value for key in prompts if (value := getattr(given, key)) is not None}
    return HeldOutSet(
        name=name,
        key=f"eval.sets.{name}",
        dataset=given.dataset,
        sampling=given.sampled(section),
        functions=given.functions,
        **(prompts | own),
    )

"""Sections of the configuration about prompts: where they come from, and how they are drawn.

Owns the rules between the keys of `data`. One set of training prompts is `data.train`, several are `data.train_sets`:
a run has one of both.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from penstock.config.types import Count, Fraction, Section

PROMPT_PLACE = "{prompt}"
TRAIN, TRAIN_SETS = "data.train", "data.train_sets"


class ColumnsSection(Section):
    """Names of the columns of a Hugging Face dataset or JSONL file. A name with dots, such as `extra_info.answer`,
    leads into objects, unless a column has this name."""

    prompt: str = "prompt"
    """Text, or a list of chat messages that goes through the model's chat template."""
    answer: str = "answer"
    """What the reward compares with."""
    reward: str = "reward"
    """Optional: the reward function for this row."""
    metadata: str = "metadata"
    """Optional: a mapping handed to the reward function."""


def _finite(options: dict[str, Any]) -> dict[str, Any]:
    """The options, without inf or nan at any depth; pydantic looks only at fields that are declared as numbers."""
    try:
        json.dumps(options, allow_nan=False, default=str)
    except ValueError:
        raise ValueError("numbers in it should be finite") from None
    return options


def _holds_the_prompt(template: str) -> str:
    if template and template.count(PROMPT_PLACE) != 1:
        raise ValueError(f"it has {PROMPT_PLACE} {template.count(PROMPT_PLACE)} times: expected it once, or no text")
    return template


PromptTemplate = Annotated[str, AfterValidator(_holds_the_prompt)]
TemplateOptions = Annotated[dict[str, Any], AfterValidator(_finite)]


class DatasetSection(Section):
    """One set of prompts."""

    kind: Literal["jsonl", "huggingface", "reasoning_gym"] = "jsonl"
    """Where the rows come from."""
    path: str = ""
    """JSONL file; dataset folder or hub name; name of a reasoning-gym task."""
    split: str = "train"
    """Split of a Hugging Face dataset. A source without splits takes only the default."""
    columns: ColumnsSection = ColumnsSection()
    """Names of the columns."""
    size: Annotated[int, Field(ge=0)] = 0
    """Use the first `size` rows; 0: all. reasoning-gym makes exactly this many."""
    seed: int = 0
    """Seed of a reasoning-gym task."""
    options: Annotated[dict[str, Any], AfterValidator(_finite)] = Field(default={})
    """Parameters of a reasoning-gym task, such as `{min_terms: 2, max_terms: 2}`."""

    @model_validator(mode="after")
    def _options_are_of_a_task(self) -> Self:
        if self.options and self.kind != "reasoning_gym":
            raise ValueError(
                f"options holds {', '.join(self.options)}, and kind is {self.kind}: expected options only with kind "
                "reasoning_gym, whose tasks have parameters"
            )
        return self


class TrainSetSection(DatasetSection):
    """One of several sets of training prompts."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """The set's share of the draws is its weight over those of all sets: each has one, or none has. Without weights
    the share is that of its prompts among all. More than 0."""
    reward: str = ""
    """The reward function of rows that name none; empty: the run's `reward.functions`."""
    system_prompt: str | None = None
    """As `data.system_prompt`, which it replaces for this set."""
    prompt_template: PromptTemplate | None = None
    """As `data.prompt_template`, which it replaces for this set."""
    template_options: TemplateOptions | None = None
    """As `data.template_options`, which it replaces for this set."""


class CurriculumSection(Section):
    """Draw prompts by their success rates so far, instead of each once in an epoch. See docs/training-sets.md."""

    priority: Literal["none", "failure", "learnability"] = "none"
    """Which prompts of a set are drawn more often: `none` is no curriculum; `failure`: in proportion to 1 - s, where s
    is the estimated success rate; `learnability`: to s (1 - s)."""
    uniform_share: Fraction = 0.1
    """Share of the draws that take any prompt of the set with the same probability."""
    decay: Fraction = 0.5
    """With each new outcome of a prompt, its earlier ones count this much less; 1: all count the same."""
    success: float = 1.0
    """A completion is a success if its reward is at least this."""
    delay_steps: Annotated[int, Field(ge=0)] = 1
    """A draw counts the steps that are further back than this many; at least `staleness.max_staleness`."""

    @property
    def described(self) -> str:
        """What of it decides draws, in words; "" if there is no curriculum."""
        if self.priority == "none":
            return ""
        return (
            f"curriculum by {self.priority}, uniform_share {self.uniform_share!r}, decay {self.decay!r}, success "
            f"{self.success!r}, delay_steps {self.delay_steps}"
        )

    @model_validator(mode="after")
    def _is_on_or_left_alone(self) -> Self:
        if self.priority == "none" and self != CurriculumSection.model_construct():
            raise ValueError(
                "data.curriculum.priority is none, and other keys of data.curriculum are set, which have no meaning "
                "then: expected priority failure or learnability, or the other keys at their defaults"
            )
        return self


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]


@dataclass(frozen=True)
class TrainingSet:
    """A set of training prompts as a run reads it. name: "" if it is the only one. key: its section, for messages."""

    name: str
    key: str
    section: TrainSetSection


class DataSection(Section):
    """Prompts."""

    train: DatasetSection = DatasetSection()
    """Prompts to train on."""
    train_sets: dict[SetName, TrainSetSection] = Field(default={})
    """Several sets of prompts to train on, by name, instead of `data.train`. Names are of letters, digits, `_` and `-`.
    See docs/training-sets.md."""
    eval: DatasetSection | None = None
    """Held-out prompts; without them there is no evaluation. Those that are training prompts too are counted: in a
    warning at start, in the closing report and in `summary.json`."""
    shuffle: bool = True
    """Draw the prompts of each epoch in an order of its own, by `run.seed`; false: in the order of the rows, several
    sets evenly mixed."""
    curriculum: CurriculumSection = CurriculumSection()
    """Draws by success rates."""
    too_long: Literal["error", "drop"] = "error"
    """Prompts, training or held out, with more tokens than engines generate to the end, less
    `sampling.max_new_tokens`: refuse to start, or leave them out and count them. See docs/prompts.md."""
    batch_size: Count = 8
    """B: groups (prompts) per training step."""
    system_prompt: str = ""
    """System message before every prompt; it turns plain prompts into chat messages."""
    prompt_template: PromptTemplate = ""
    """Text around each prompt that is plain text, which stands where it says `{prompt}`: an instruction, or examples of
    the task. See docs/prompts.md."""
    template_options: TemplateOptions = Field(default={})
    """Variables of the model's chat template, such as `{enable_thinking: false}`; one that it does not read is refused.
    See docs/prompts.md."""

    @property
    def training_sets(self) -> list[TrainingSet]:
        """The sets that the run trains on, in their order; one without a name if they are `data.train`."""
        if not self.train_sets:
            return [TrainingSet("", TRAIN, TrainSetSection.model_validate(self.train.model_dump()))]
        return [TrainingSet(name, f"{TRAIN_SETS}.{name}", section) for name, section in self.train_sets.items()]

    def system_prompt_of(self, dataset: str) -> str:
        """The system prompt of a set, by its name; "" is the run's only set, or the held-out prompts."""
        own = self.train_sets[dataset].system_prompt if dataset else None
        return self.system_prompt if own is None else own

    @model_validator(mode="after")
    def _has_sets(self) -> Self:
        for reason in self._problems_of_sets():
            raise ValueError(reason)
        return self

    def _problems_of_sets(self) -> Iterator[str]:
        sets = self.train_sets
        if self.curriculum.priority != "none" and not self.shuffle:
            yield (
                f"data.shuffle is false with data.curriculum.priority {self.curriculum.priority}, which draws prompts "
                "by chance: expected shuffle true, or priority none"
            )
        if not sets:
            return
        if self.train != DatasetSection():
            yield (
                f"data.train (path {self.train.path!r}) and data.train_sets ({', '.join(sets)}) are both set: expected "
                "one of them; make data.train one more entry of data.train_sets"
            )
        if len(sets) == 1:
            yield (
                f"data.train_sets holds one set, {', '.join(sets)}: expected two or more; one set of training prompts "
                "is data.train"
            )
        if without := [name for name, section in sets.items() if not section.path]:
            yield (
                f"data.train_sets.{without[0]}.path is empty: expected a JSONL file, a dataset or a reasoning-gym task"
            )
        unweighted = [name for name, section in sets.items() if section.weight is None]
        if unweighted and len(unweighted) < len(sets):
            yield (
                f"data.train_sets: {', '.join(unweighted)} without a weight beside sets with one: expected a weight "
                "for each set, or for none"
            )

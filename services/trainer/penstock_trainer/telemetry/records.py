"""One step and one evaluation, as they are written and shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from penstock.contracts.vocabulary import MAIN_SET
from penstock.records.figures import is_finite

NUM_BINS = 12  # of a histogram: a curve shows no more, and a line stays small


@dataclass(frozen=True)
class EvalSample:
    """One completion, for people to read: without the layout of a chat (`penstock.readable`).

    failure: why it has no reward; empty if it has one.
    """

    prompt: str
    completion: str
    answer: str
    reward: float | None
    failure: str = ""


@dataclass(frozen=True)
class EvalResult:
    """accuracy: share of the prompts with a reward whose reward reaches eval.success; steps: those trained before it.

    With several completions of a prompt (samples_per_prompt), the prompt's share of them, and its mean reward, of those
    with a reward. accuracy_interval: low and high, 95 % (`rollouts.repeated`); pass_at: by k, value, low and high.
    num_scored: prompts with a reward, of which both means are; None without any. num_failed: the others: their rewards
    failed, or their tickets became poison. failed: the rows of all completions without a reward, or the first of them.
    rewards: as of a step.
    failures: why, each with their number. success: eval.success. prompts: digest of the prompts; num_trained: how many
    of them are training prompts too; None in a line of a release that did not count them. set: the name of the prompts'
    set.
    """

    steps: int
    accuracy: float | None
    reward_mean: float | None
    num_prompts: int
    num_scored: int
    num_failed: int
    oldest_version: int
    newest_version: int
    samples: tuple[EvalSample, ...]
    rewards: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    success: float = 1.0
    prompts: str = ""
    num_trained: int | None = None
    failed: tuple[EvalSample, ...] = ()
    samples_per_prompt: int = 1
    accuracy_interval: dict[str, float] = field(default_factory=dict)
    pass_at: dict[str, dict[str, float]] = field(default_factory=dict)
    set: str = MAIN_SET


@dataclass(frozen=True)
class Histogram:
    """How often values occurred, in bins of equal width from `lowest` to `highest`; one bin if all are equal."""

    lowest: float
    highest: float
    counts: tuple[int, ...]

    @staticmethod
    def of(values: Sequence[float]) -> "Histogram":
        """Of at least one value, all finite."""
        lowest, highest = float(min(values)), float(max(values))
        if lowest == highest:
            return Histogram(lowest, highest, (len(values),))
        counts, _ = np.histogram(np.asarray(values, dtype=np.float64), bins=NUM_BINS)
        return Histogram(lowest, highest, tuple(counts.tolist()))

    def moment(self, power: int) -> float:
        """The sum of a power of the values, as if each were at the middle of its bin."""
        edges = self.edges
        return float(np.dot(self.counts, ((edges[:-1] + edges[1:]) / 2) ** power))

    @property
    def as_numpy(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Counts and edges, as `numpy.histogram` gives them."""
        return np.array(self.counts), self.edges

    @property
    def edges(self) -> npt.NDArray[np.float64]:
        """The bounds of the bins: one more than there are bins."""
        return np.linspace(self.lowest, self.highest, len(self.counts) + 1)


@dataclass(frozen=True)
class PushTimes:
    """When the weights of a version were pushed, in Unix seconds. paused_seconds: for which generation stood still."""

    version: int
    started_at: float
    ended_at: float
    paused_seconds: float


@dataclass(frozen=True)
class StepLine:
    """One step. Unix seconds; seconds by phase; generation_seconds: at least one training request was running.

    rewards: the figures of each reward function, as `batching.rewards.function_figures` defines them.
    failures: why completions of its groups have no reward, each with their number.
    histograms: reward, advantage, length (sampled tokens) and staleness, each if a completion of the batch has one.
    pushes: those that ended since the line before: usually of the version that the step trained.
    sets: the figures of each training set, as `batching.training_sets.set_figures` defines them; empty with one set.
    """

    step: int
    version: int
    epoch: float
    tickets: tuple[int, ...]
    started_at: float
    ended_at: float
    seconds: dict[str, float]
    generation_seconds: float
    generated_tokens: int
    reward_mean: float
    staleness_max: int
    staleness_mean: float
    statistics: dict[str, float]
    rewards: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    pushes: tuple[PushTimes, ...] = ()
    sets: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether the figures of its update are; others may be nan, such as the mean of no rewards."""
        return is_finite(self.statistics)

    @property
    def has_gradient(self) -> bool:
        """Whether any completion had a gradient; nan is none."""
        return self.statistics.get("grad_norm", 0.0) > 0

"""One step and one evaluation, as they are written and shown."""

from dataclasses import dataclass, field

from penstock.records.figures import is_finite


@dataclass(frozen=True)
class EvalSample:
    """One completion, for people to read: without the layout of a chat (`penstock.readable`)."""

    prompt: str
    completion: str
    answer: str
    reward: float | None


@dataclass(frozen=True)
class EvalResult:
    """accuracy: share of prompts whose reward reaches eval.success; steps: those trained when it was requested.

    num_failed: prompts without a reward, which count as not accurate: it failed, or their ticket became poison.
    failures: why, each with their number. success: eval.success. prompts: digest of the prompts; num_trained: how many
    of them are training prompts too; None in a line of a release that did not count them.
    """

    steps: int
    accuracy: float
    reward_mean: float
    num_prompts: int
    num_failed: int
    oldest_version: int
    newest_version: int
    samples: tuple[EvalSample, ...]
    failures: dict[str, int] = field(default_factory=dict)
    success: float = 1.0
    prompts: str = ""
    num_trained: int | None = None


@dataclass(frozen=True)
class StepLine:
    """One step. Unix seconds; seconds by phase; generation_seconds: at least one training request was running.

    failures: why completions of its groups have no reward, each with their number.
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
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether the figures of its update are; others may be nan, such as the mean of no rewards."""
        return is_finite(self.statistics)

    @property
    def has_gradient(self) -> bool:
        """Whether any completion had a gradient; nan is none."""
        return self.statistics.get("grad_norm", 0.0) > 0

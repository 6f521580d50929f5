"""The figures of a run, made of its lines: what its ending says, and what runs are compared by.

Owns their names and definitions, which are those of `summary.json`. Invariant: they cover all lives of a run, whatever
ended the last one; time in which no trainer lived is in none of them. One pass over each file, in little memory.
"""

import math
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

import msgspec

from penstock.contracts.ledger import DropRecord, EarlyStopRecord, Record, StepRecord
from penstock.contracts.vocabulary import MAIN_SET, DropReason

REWARD_WINDOW_STEPS = 5  # of the moving average of the training reward
WARM_UP_STEPS = 2  # left out of figures of time, if there are other steps
TARGET_REWARD = 0.9
UPDATE_FIGURES = frozenset({"loss", "grad_norm", "learning_rate"})
COUNTS = (
    *("completions", "failed_completions", "truncated_completions"),
    *("groups", "failed_groups", "degenerate_groups"),
)  # of a step's statistics
HELD_OUT = "heldout_"  # before the names of figures of held-out prompts
EPISODE = "episode_"  # before the names of figures of episodes
MOST_REASONS = 3  # that are named; a person reads them

Line = Mapping[str, Any]
T = TypeVar("T")
L = TypeVar("L", bound=Line)


def is_finite(statistics: Mapping[str, float]) -> bool:
    """Whether the figures of an update are; others may be nan, such as the mean of no rewards."""
    return all(math.isfinite(statistics[name]) for name in statistics.keys() & UPDATE_FIGURES)


class Timing:
    """The time of some steps, by phase. times: of each step, seconds by phase and generation seconds."""

    def __init__(self, times: Iterable[tuple[Mapping[str, float], float]]) -> None:
        self.num_steps = 0
        self._seconds: dict[str, float] = {}
        self._generation = self._training = 0.0
        for seconds, generation in times:
            self.num_steps += 1
            for phase, each in seconds.items():
                self._seconds[phase] = self._seconds.get(phase, 0.0) + each
            self._generation += generation
            self._training += seconds.get("forward_backward", 0.0) + seconds.get("optimizer", 0.0)

    @property
    def mean_seconds(self) -> dict[str, float]:
        """Per step, by phase."""
        return {phase: self._seconds[phase] / self.num_steps for phase in sorted(self._seconds)}

    @property
    def gap_to_ideal(self) -> float | None:
        """Step time over the longer of generation and training time, minus 1."""
        ideal = max(self._generation, self._training)
        return self._seconds.get("step", 0.0) / ideal - 1 if ideal > 0 else None


def run_figures(steps: Iterable[Line], evaluations: Iterable[Line], ledger: Iterable[Record]) -> dict[str, Any]:
    """The figures of a run; those that it does not have yet are None or 0. They are JSON but for nan."""
    every = sorted(evaluations, key=lambda line: int(line["steps"]))  # one that was requested earlier may end later
    evals = [line for line in every if set_of(line) == MAIN_SET]
    successes = [line["steps"] for line in evals if (heldout_accuracy(line) or 0.0) >= TARGET_REWARD]
    found, tickets = _Steps(frozenset(successes)), _Tickets()
    timing = Timing(without_warm_up((line["seconds"], line["generation_seconds"]) for line in found.counting(steps)))
    tickets.count(ledger)
    return {
        "steps": found.num,
        "non_finite_steps": found.num_non_finite,
        "training_started_at": found.started_at,
        "epochs": found.epochs,
        "seconds_training": found.seconds,
        "seconds_to_reward_0_9": found.seconds_to_target,
        # The end of the step after which held-out accuracy first reached 0.9.
        "seconds_to_heldout_0_9": next((found.seconds_at[n] for n in successes if n in found.seconds_at), None),
        "reward_window_steps": found.window,
        "reward_mean_first": _mean(found.first[: found.window]),
        "reward_mean_last": _mean(list(found.last)[-found.window :]),
        **_heldout_figures(evals),
        "heldout_sets": {
            name: _set_figures([each for each in every if set_of(each) == name]) for name in others(every)
        },
        "stopped_early": tickets.early_stop_after(found.num),
        "staleness_max": found.staleness_max if found.num else None,
        **({"episodes": found.episodes} if found.episodes else {}),
        "tickets": {"trained": tickets.num_trained, "dropped": dict(tickets.dropped)},
        "lost_messages": _most_frequent(tickets.lost),
        "completions": {
            "num": found.num_completions + tickets.num_completions,
            "of_steps": found.num_completions,
            "failed": found.counts["failed_completions"] + tickets.failures.total(),
            "truncated": found.counts.get("truncated_completions"),  # of those of steps
        },
        "failures": _most_frequent(found.failures + tickets.failures),
        **({"sets": _sets(found.sets, tickets)} if found.sets or tickets.sets else {}),
        "groups": {
            "num": found.counts["groups"] + found.counts["failed_groups"] + tickets.num_groups,
            "no_signal": found.counts["degenerate_groups"]
            + found.counts["failed_groups"]
            + tickets.dropped[DropReason.DEGENERATE]
            + tickets.dropped[DropReason.REWARD_FAILED],
        },
        "seconds_per_step": timing.mean_seconds,
        "generation_seconds_per_step": _ratio(found.generation_seconds, found.num),
        "tokens_per_second": _ratio(found.tokens, found.seconds),
        "generation_tokens_per_second": _ratio(found.tokens, found.generation_seconds),
        "gap_to_ideal": timing.gap_to_ideal,
    }


@dataclass
class _OfSet:
    """What the lines of steps come to for one training set."""

    num_prompts: int = 0
    num_rewards: int = 0
    reward_sum: float = 0.0
    num_without_signal: int = 0


def _sets(found: Mapping[str, _OfSet], tickets: "_Tickets") -> dict[str, dict[str, Any]]:
    """By training set: prompts trained, their mean reward, the share without a signal, and what was dropped."""
    return {
        name: {
            "prompts": each.num_prompts,
            "reward_mean": _ratio(each.reward_sum, each.num_rewards),
            "dropped": dict(tickets.sets.get(name, {})),
            "no_signal": each.num_without_signal + tickets.num_without_signal(name),
        }
        for name in sorted({*found, *tickets.sets})
        for each in (found.get(name, _OfSet()),)
    }


def _heldout_figures(evals: Sequence[Line]) -> dict[str, Any]:
    start, end = first_and_last(evals)
    figures: dict[str, Any] = {}
    for name, line in (("start", start), ("end", end)):
        figures |= {
            f"heldout_steps_{name}": line and line["steps"],
            f"heldout_reward_{name}": line and heldout_reward(line),
            f"heldout_accuracy_{name}": line and heldout_accuracy(line),
            f"heldout_failed_{name}": line["num_failed"] if line else 0,
            f"heldout_accuracy_interval_{name}": line.get("accuracy_interval", {}) if line else {},
            f"heldout_pass_at_{name}": line.get("pass_at", {}) if line else {},
        }
    return {
        **figures,
        "heldout_success": end and end.get("success"),
        "heldout_digest": end and end.get("prompts"),
        "heldout_prompts": end["num_prompts"] if end else 0,
        "heldout_prompts_trained": end and end.get("num_trained"),
        "heldout_failures": end.get("failures", {}) if end else {},
        "samples_before": start["samples"] if start else [],
        "samples_after": end["samples"] if end and end is not start else [],
    }


def _set_figures(evals: Sequence[Line]) -> dict[str, Any]:
    """Of a set that is not the main one: the same figures, named without `heldout_`, and no samples."""
    figures = _heldout_figures(evals)
    return {name.removeprefix(HELD_OUT): value for name, value in figures.items() if name.startswith(HELD_OUT)}


def set_of(line: Line) -> str:
    """The set of an evaluation; an earlier release had only the main one."""
    return str(line.get("set", MAIN_SET))


def others(evals: Iterable[Line]) -> list[str]:
    """The names of the sets beside the main one, in the order in which they come."""
    return list(dict.fromkeys(name for line in evals if (name := set_of(line)) != MAIN_SET))


def of_set(figures: Line, name: str) -> dict[str, Any]:
    """The figures of a set of `heldout_sets` as those of the main one are named."""
    return {f"{HELD_OUT}{key}": value for key, value in figures["heldout_sets"][name].items()}


def first_and_last(evals: Sequence[L]) -> tuple[L | None, L | None]:
    """The last evaluation, and before it the first of the same prompts and threshold; `evals` ascend by their steps.

    All of one set, whose prompts and success may change between two starts.
    """
    end = evals[-1] if evals else None
    return next((line for line in evals if end is not None and asks_the_same(line, end)), None), end


def heldout_reward(line: Line) -> float | None:
    """The mean reward of an evaluation, of the prompts that have one; None if no prompt of it has one."""
    return float(line["reward_mean"]) if line["num_failed"] < line["num_prompts"] else None


def heldout_accuracy(line: Line) -> float | None:
    """The accuracy of an evaluation, of the prompts that have a reward; None if no prompt of it has one.

    A line without num_scored is of an earlier release, which counted a failed reward as a wrong answer.
    """
    num_scored = int(line["num_prompts"]) - int(line["num_failed"])
    if not num_scored:
        return None
    accuracy = float(line["accuracy"])
    return accuracy if "num_scored" in line else accuracy * int(line["num_prompts"]) / num_scored


def asks_the_same(one: Line, other: Line) -> bool:
    """Whether two evaluations are of the same prompts, judged in the same way."""
    return all(one.get(name) == other.get(name) for name in ("prompts", "num_prompts", "success"))


class _Tickets:
    """What one pass over the ledger's records counts; of dropped groups, which no step has."""

    def __init__(self) -> None:
        self.num_trained = self.num_completions = self.num_groups = 0
        self.dropped: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.sets: dict[str, Counter[str]] = {}
        self._early_stop: EarlyStopRecord | None = None

    def early_stop_after(self, num_steps: int) -> dict[str, Any] | None:
        """Why the run ended after so many steps, of more; None if that was not decided, or it went on."""
        found = self._early_stop
        return msgspec.structs.asdict(found) if found is not None and found.steps == num_steps else None

    def num_without_signal(self, name: str) -> int:
        """Dropped groups of a set that had none."""
        counts = self.sets.get(name, Counter())
        return counts[DropReason.DEGENERATE] + counts[DropReason.REWARD_FAILED]

    def count(self, records: Iterable[Record]) -> None:
        for record in records:
            if isinstance(record, StepRecord):
                self.num_trained += len(record.tickets)
            elif isinstance(record, DropRecord):
                self.dropped[str(record.reason)] += 1
                if record.dataset:
                    self.sets.setdefault(record.dataset, Counter())[str(record.reason)] += 1
                self.failures.update(record.failures)
                self.num_completions += record.num_completions
                self.num_groups += record.reason != DropReason.POISON
                self.lost.update([record.why] if record.why else [])
            elif isinstance(record, EarlyStopRecord):
                self._early_stop = record


class _Steps:
    """What one pass over the lines of steps counts. marks: numbers of steps after which the time is needed."""

    def __init__(self, marks: Container[int]) -> None:
        self._marks = marks
        self.num = self.num_non_finite = self.tokens = self.staleness_max = 0
        self.seconds = self.generation_seconds = self.epochs = 0.0
        self.started_at: float | None = None
        self.seconds_to_target: float | None = None
        self.seconds_at: dict[int, float] = {}
        self.counts: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=REWARD_WINDOW_STEPS)
        self.sets: dict[str, _OfSet] = {}
        self._episodes: dict[str, tuple[float, float]] = {}

    def counting(self, lines: Iterable[Line]) -> Iterator[Line]:
        """The same lines, counted as they pass."""
        for line in lines:
            self._count(line)
            self._count_statistics(line["statistics"])
            self.failures.update(line.get("failures", {}))
            self._count_sets(line.get("sets", {}))
            yield line

    def _count(self, line: Line) -> None:
        self.num += 1
        started_at = float(line["started_at"])
        self.started_at = started_at if self.started_at is None else self.started_at
        self.epochs = line["epoch"]
        self.seconds += line["seconds"].get("step", 0.0)
        if line["step"] + 1 in self._marks:
            self.seconds_at[line["step"] + 1] = self.seconds
        self.generation_seconds += line["generation_seconds"]
        self.tokens += line["generated_tokens"]
        self.staleness_max = max(self.staleness_max, line["staleness_max"])
        self.last.append(line["reward_mean"])
        if len(self.first) < REWARD_WINDOW_STEPS:
            self.first.append(line["reward_mean"])
        if self.seconds_to_target is None and len(self.last) == REWARD_WINDOW_STEPS:
            self.seconds_to_target = self.seconds if sum(self.last) / len(self.last) >= TARGET_REWARD else None

    def _count_statistics(self, statistics: Mapping[str, float]) -> None:
        self.num_non_finite += not is_finite(statistics)
        for name in COUNTS:
            if f"num_{name}" in statistics:
                self.counts[name] += int(statistics[f"num_{name}"])
        for name, value in statistics.items():
            if name.startswith(EPISODE):
                total, largest = self._episodes.get(name, (0.0, -math.inf))
                self._episodes[name] = (total + value, max(largest, value))

    def _count_sets(self, sets: Mapping[str, Mapping[str, float]]) -> None:
        for name, figures in sets.items():
            each = self.sets.setdefault(name, _OfSet())
            each.num_prompts += int(figures["num_prompts"])
            each.num_rewards += int(figures["num_rewards"])
            each.reward_sum += figures["num_rewards"] * figures.get("reward_mean", 0.0)
            each.num_without_signal += round(figures["num_prompts"] * figures["no_signal_ratio"])

    @property
    def num_completions(self) -> int:
        """With a reward and without one."""
        return self.counts["completions"] + self.counts["failed_completions"]

    @property
    def window(self) -> int:
        """Steps of the first and of the last mean, which have none in common."""
        return min(REWARD_WINDOW_STEPS, max(1, self.num // 2))

    @property
    def episodes(self) -> dict[str, float]:
        """Means of the steps' figures, the largest of a largest; empty without episodes."""
        return {
            name.removeprefix(EPISODE): largest if name.endswith("_max") else total / self.num
            for name, (total, largest) in sorted(self._episodes.items())
        }


def without_warm_up(items: Iterable[T]) -> Iterator[T]:
    """What comes after the first steps; all if there is no more."""
    rest = iter(items)
    first = list(islice(rest, WARM_UP_STEPS))
    after = list(islice(rest, 1))
    return chain(after, rest) if after else iter(first)


def _most_frequent(reasons: Counter[str]) -> dict[str, int]:
    return dict(reasons.most_common(MOST_REASONS))


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _ratio(amount: float, of: float) -> float | None:
    return amount / of if of else None

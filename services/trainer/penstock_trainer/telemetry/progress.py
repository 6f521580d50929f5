"""The history of a run: one JSON line per step and per evaluation, and the figures made of them.

Owns `steps.jsonl` and `evals.jsonl` in the run's folder: they survive a restart, and a step that is trained again after
one is written once, as is an evaluation after the same number of steps. Memory holds the last lines and the values of
every report, however long the run is; the rest is read from the files.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from penstock.durable import writing
from penstock_trainer.telemetry.records import EvalResult, StepLine

REWARD_WINDOW_STEPS = 5  # of the moving average of the training reward
RECENT_STEPS = 10
KEPT_STEPS = 60  # as many as a line of a terminal has room for
WARM_UP_STEPS = 2  # left out of figures of time, if there are other steps


class _StepBrief(msgspec.Struct, frozen=True):
    step: int
    started_at: float
    staleness_max: int


class _EvalBrief(msgspec.Struct, frozen=True):
    steps: int
    accuracy: float


class Timing:
    """The time of some steps, by phase."""

    def __init__(self, lines: Iterable[StepLine]) -> None:
        self.num_steps = 0
        self._seconds: dict[str, float] = {}
        self._generation = self._training = 0.0
        for line in lines:
            self.num_steps += 1
            for phase, seconds in line.seconds.items():
                self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
            self._generation += line.generation_seconds
            self._training += line.seconds.get("forward_backward", 0.0) + line.seconds.get("optimizer", 0.0)

    @property
    def mean_seconds(self) -> dict[str, float]:
        """Per step, by phase."""
        return {phase: self._seconds[phase] / self.num_steps for phase in sorted(self._seconds)}

    @property
    def gap_to_ideal(self) -> float | None:
        """Step time over the longer of generation and training time, minus 1."""
        ideal = max(self._generation, self._training)
        return self._seconds.get("step", 0.0) / ideal - 1 if ideal > 0 else None


def without_warm_up(lines: Iterable[StepLine]) -> Iterator[StepLine]:
    """The lines after the first steps; all if there are no more."""
    rest = iter(lines)
    first = list(islice(rest, WARM_UP_STEPS))
    after = list(islice(rest, 1))
    return chain(after, rest) if after else iter(first)


class Progress:
    """The step and evaluation lines of a run, earlier lives of its trainer included.

    kept: the last lines. staleness_max, first_started_at: of all lines.
    """

    def __init__(self, folder: Path) -> None:
        with writing(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        self._steps_path = folder / "steps.jsonl"
        self._evals_path = folder / "evals.jsonl"
        self._load_steps()
        self._load_evals()

    def _load_evals(self) -> None:
        briefs = [_decoded(line, _EvalBrief) for line in _complete_lines(self._evals_path)]
        self._accuracies = {brief.steps: brief.accuracy for brief in briefs}

    def _load_steps(self) -> None:
        self.num_steps = 0
        self.staleness_max = 0
        self.first_started_at: float | None = None
        self._written: list[range] = []  # steps that have a line: nearly always one range
        last: deque[bytes] = deque(maxlen=KEPT_STEPS)
        for line in _complete_lines(self._steps_path):
            brief = _decoded(line, _StepBrief)
            self._note(brief.step, brief.started_at, brief.staleness_max)
            last.append(line)
        self.kept = deque((_decoded(line, StepLine) for line in last), maxlen=KEPT_STEPS)

    def _note(self, step: int, started_at: float, staleness_max: int) -> None:
        if self._written and step == self._written[-1].stop:
            self._written[-1] = range(self._written[-1].start, step + 1)
        else:
            self._written.append(range(step, step + 1))
        self.num_steps += 1
        self.staleness_max = max(self.staleness_max, staleness_max)
        if self.first_started_at is None:
            self.first_started_at = started_at

    def add_step(self, line: StepLine) -> None:
        if self.has_step(line.step):
            return
        _append(self._steps_path, asdict(line))
        self._note(line.step, line.started_at, line.staleness_max)
        self.kept.append(line)

    def has_step(self, step: int) -> bool:
        """Whether a line of this step is written."""
        return any(step in steps for steps in self._written)

    @property
    def highest_step(self) -> int:
        """The highest step with a line; -1 without any."""
        return max((steps.stop for steps in self._written), default=0) - 1

    def forget_from(self, num_steps: int) -> None:
        """Remove the lines of steps that the ledger lacks: the queue lost them, and they are trained anew.

        So are evaluations after these steps: they were of weights that are gone.
        """
        if self.highest_step >= num_steps:
            _keep(self._steps_path, lambda line: _decoded(line, _StepBrief).step < num_steps)
            self._load_steps()
        if max(self._accuracies, default=0) > num_steps:
            _keep(self._evals_path, lambda line: _decoded(line, _EvalBrief).steps <= num_steps)
            self._load_evals()

    def add_eval(self, result: EvalResult) -> None:
        if self.has_eval(result.steps):
            return
        _append(self._evals_path, asdict(result))
        self._accuracies[result.steps] = result.accuracy

    def has_eval(self, steps: int) -> bool:
        """Whether an evaluation after so many steps is written."""
        return steps in self._accuracies

    @property
    def recent(self) -> list[StepLine]:
        """The lines of which rates and averages are."""
        return list(self.kept)[-RECENT_STEPS:]

    @property
    def first_accuracy(self) -> float | None:
        """Of the evaluation after the fewest steps."""
        return self._accuracies[min(self._accuracies)] if self._accuracies else None

    @property
    def last_eval_steps(self) -> int | None:
        """The steps before the last evaluation: one that was requested earlier may end later."""
        return max(self._accuracies, default=None)

    @property
    def last_accuracy(self) -> float | None:
        """Of the evaluation after the most steps."""
        steps = self.last_eval_steps
        return None if steps is None else self._accuracies[steps]

    def step_lines(self) -> Iterator[StepLine]:
        """All of them, from the file."""
        return (_decoded(line, StepLine) for line in _complete_lines(self._steps_path))

    def steps_after(self, step: int) -> Iterator[dict[str, Any]]:
        """The lines of later steps as they are written, from the file."""
        lines = (line for line in _complete_lines(self._steps_path) if _decoded(line, _StepBrief).step > step)
        return map(json.loads, lines)

    def evals(self) -> Iterator[dict[str, Any]]:
        """All of them as they are written, in the order in which they ended, from the file."""
        return map(json.loads, _complete_lines(self._evals_path))

    @property
    def non_finite_in_a_row(self) -> int:
        """The steps up to the last one whose figures are not finite; one without a gradient proves nothing."""
        in_a_row = 0
        for line in self.step_lines():
            if not line.is_finite:
                in_a_row += 1
            elif line.has_gradient:
                in_a_row = 0
        return in_a_row

    @property
    def reward_average(self) -> float | None:
        """Moving average of the training reward."""
        rewards = [line.reward_mean for line in self.recent[-REWARD_WINDOW_STEPS:]]
        return sum(rewards) / len(rewards) if rewards else None

    @property
    def gap_to_ideal(self) -> float | None:
        """The gap to ideal of the recent steps."""
        lines = self.recent
        num_warm_up = max(0, WARM_UP_STEPS - (self.num_steps - len(lines)))
        return Timing(lines[num_warm_up:] or lines).gap_to_ideal


def _complete_lines(path: Path) -> Iterator[bytes]:
    """The complete lines in order; a last line that a crash cut off is removed from the file."""
    if not path.exists():
        return
    end = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(end)
                return
            end += len(line)
            yield line


def _keep(path: Path, wanted: Callable[[bytes], bool]) -> None:
    """Keep only the wanted lines."""
    temporary = path.with_suffix(".tmp")
    with writing(str(path)):
        with temporary.open("wb") as file:
            file.writelines(line for line in _complete_lines(path) if wanted(line))
        temporary.replace(path)


B = TypeVar("B", _StepBrief, _EvalBrief, StepLine)


def _decoded(line: bytes, expected: type[B]) -> B:
    """A line as `expected`. A figure may be NaN, which is no JSON and which only Python's parser reads."""
    try:
        return msgspec.json.decode(line, type=expected)
    except msgspec.DecodeError:
        return msgspec.convert(json.loads(line), expected)


def _append(path: Path, line: dict[str, Any]) -> None:
    with writing(str(path)), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

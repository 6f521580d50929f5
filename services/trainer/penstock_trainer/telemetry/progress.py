"""The history of a run: one JSON line per step and per evaluation, and the figures of the last ones.

Owns `steps.jsonl` and `evals.jsonl` in the run's folder: they survive a restart, and a step that is trained again after
one is written once, as is an evaluation of a set after the same number of steps. Memory holds the last lines and the
values of every report, however long the run is; the rest is read from the files. A start reads the last lines
(`lines_read`).
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from penstock.contracts.vocabulary import MAIN_SET
from penstock.durable import writing
from penstock.records.figures import (
    REWARD_WINDOW_STEPS,
    WARM_UP_STEPS,
    Timing,
    heldout_accuracy,
    heldout_reward,
    set_of,
)
from penstock.records.files import EVALUATIONS_FILE, STEPS_FILE
from penstock.records.lines import as_written, complete_lines, cut_unfinished_line, decoded, start_of_last_lines
from penstock_trainer.telemetry.lines_read import keep, read_so_far
from penstock_trainer.telemetry.records import EvalResult, StepLine

RECENT_STEPS = 10
KEPT_STEPS = 60  # as many as a line of a terminal has room for
COMPARED = (
    *("set", "steps", "accuracy", "reward_mean", "num_prompts", "num_scored", "num_failed"),
    *("oldest_version", "newest_version", "prompts", "success"),
)
NOTED_EVERY = 1000  # lines: so many at most are read at a start


class _StepBrief(msgspec.Struct, frozen=True):
    step: int
    staleness_max: int


class _EvalSteps(msgspec.Struct, frozen=True):
    steps: int


class EvalBrief(msgspec.Struct, frozen=True):
    """What is shown of an evaluation while the run goes on; of none, nothing is known.

    steps: before it. accuracy, reward (the mean): of the prompts with a reward; None if there are none.
    """

    steps: int | None = None
    accuracy: float | None = None
    reward: float | None = None
    num_prompts: int | None = None
    num_failed: int | None = None


class Progress:
    """The step and evaluation lines of a run, earlier lives of its trainer included.

    kept: the last lines. staleness_max: of all lines.
    """

    def __init__(self, folder: Path) -> None:
        with writing(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        self._steps_path = folder / STEPS_FILE
        self._evals_path = folder / EVALUATIONS_FILE
        cut_unfinished_line(self._steps_path)
        cut_unfinished_line(self._evals_path)
        self._load_steps()
        self._load_evals()

    def _load_evals(self) -> None:
        self._evals: dict[str, dict[int, EvalBrief]] = {}
        self._eval_lines: dict[tuple[str, int], dict[str, Any]] = {}
        self._ends: dict[str, tuple[int, int]] = {}
        self._last_eval = 0
        for line in map(as_written, complete_lines(self._evals_path)):
            self._note_eval(line)

    def _note_eval(self, line: dict[str, Any]) -> None:
        name, steps = set_of(line), int(line["steps"])
        self._evals.setdefault(name, {})[steps] = _brief(line)
        self._eval_lines[name, steps] = {key: value for key, value in line.items() if key in COMPARED}
        first, last = self._ends.get(name, (steps, steps))
        self._ends[name] = (min(steps, first), max(steps, last))
        self._last_eval = max(steps, self._last_eval)

    def _load_steps(self) -> None:
        self._known = known = read_so_far(self._steps_path)
        self.num_steps, self.staleness_max = known.num_steps, known.staleness_max
        # Steps that have a line: nearly always one range.
        self._written = [range(start, stop) for start, stop in known.written]
        first = start_of_last_lines(self._steps_path, known.num_bytes, KEPT_STEPS) if known.num_bytes else 0
        position, last = first, deque[bytes](maxlen=KEPT_STEPS)
        for line in complete_lines(self._steps_path, first):
            if position >= known.num_bytes:
                brief = decoded(line, _StepBrief)
                self._note(brief.step, brief.staleness_max)
            position += len(line)
            last.append(line)
        self.kept = deque((decoded(line, StepLine) for line in last), maxlen=KEPT_STEPS)
        self._keep_known()

    def _keep_known(self) -> None:
        """For the next start, if there are many lines that it would have to read."""
        if self.num_steps - self._known.num_steps >= NOTED_EVERY:
            size = self._steps_path.stat().st_size
            self._known = keep(self._steps_path, size, self.num_steps, self.staleness_max, self._written)

    def _note(self, step: int, staleness_max: int) -> None:
        if self._written and step == self._written[-1].stop:
            self._written[-1] = range(self._written[-1].start, step + 1)
        else:
            self._written.append(range(step, step + 1))
        self.num_steps += 1
        self.staleness_max = max(self.staleness_max, staleness_max)

    def add_step(self, line: StepLine) -> None:
        if self.has_step(line.step):
            return
        _append(self._steps_path, asdict(line))
        self._note(line.step, line.staleness_max)
        self.kept.append(line)
        self._keep_known()

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
            _keep(self._steps_path, lambda line: decoded(line, _StepBrief).step < num_steps)
            self._load_steps()
        if self._last_eval > num_steps:
            _keep(self._evals_path, lambda line: decoded(line, _EvalSteps).steps <= num_steps)
            self._load_evals()

    def add_eval(self, result: EvalResult) -> None:
        if self.has_eval(result.steps, result.set):
            return
        line = asdict(result)
        _append(self._evals_path, line)
        self._note_eval(line)

    def has_eval(self, steps: int, name: str = MAIN_SET) -> bool:
        """Whether an evaluation of this set after so many steps is written."""
        return steps in self._evals.get(name, {})

    @property
    def recent(self) -> list[StepLine]:
        """The lines of which rates and averages are."""
        return list(self.kept)[-RECENT_STEPS:]

    @property
    def first_eval(self) -> EvalBrief:
        """The evaluation of the main set after the fewest steps."""
        return self.ends_of(MAIN_SET)[0]

    @property
    def last_eval(self) -> EvalBrief:
        """The evaluation of the main set after the most steps: one that was requested earlier may end later."""
        return self.ends_of(MAIN_SET)[1]

    def ends_of(self, name: str) -> tuple[EvalBrief, EvalBrief]:
        """The evaluations of a set after the fewest and after the most steps."""
        if name not in self._ends:
            return EvalBrief(), EvalBrief()
        first, last = self._ends[name]
        return self._evals[name][first], self._evals[name][last]

    def compared_evals(self) -> list[dict[str, Any]]:
        """Of all evaluations, what of their lines decides which is the best."""
        return list(self._eval_lines.values())

    @property
    def evaluated_sets(self) -> tuple[str, ...]:
        """The names of all sets with an evaluation."""
        return tuple(self._ends)

    def step_lines(self) -> Iterator[StepLine]:
        """All of them, from the file."""
        return (decoded(line, StepLine) for line in complete_lines(self._steps_path))

    def reward_range(self) -> tuple[float, float] | None:
        """The lowest and the highest reward of all steps, from the file; None if none has a reward."""
        found = [line.histograms["reward"] for line in self.step_lines() if "reward" in line.histograms]
        if not found:
            return None
        return min(each.lowest for each in found), max(each.highest for each in found)

    def steps_after(self, step: int) -> Iterator[dict[str, Any]]:
        """The lines of later steps as they are written, from the file."""
        lines = (line for line in complete_lines(self._steps_path) if decoded(line, _StepBrief).step > step)
        return map(as_written, lines)

    def evals(self) -> Iterator[dict[str, Any]]:
        """All of them as they are written, in the order in which they ended, from the file."""
        return map(as_written, complete_lines(self._evals_path))

    @property
    def non_finite_in_a_row(self) -> int:
        """The steps up to the last one whose figures are not finite; one without a gradient proves nothing."""
        in_a_row, is_decided = _non_finite_at_the_end(self.kept)
        if is_decided or len(self.kept) == self.num_steps:
            return in_a_row
        return _non_finite_at_the_end(self.step_lines())[0]

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
        return Timing((line.seconds, line.generation_seconds) for line in lines[num_warm_up:] or lines).gap_to_ideal


def _brief(line: dict[str, Any]) -> EvalBrief:
    return EvalBrief(
        line["steps"], heldout_accuracy(line), heldout_reward(line), line["num_prompts"], line["num_failed"]
    )


def _non_finite_at_the_end(lines: Iterable[StepLine]) -> tuple[int, bool]:
    """Steps since the last finite one with a gradient, and whether there is one."""
    in_a_row, is_decided = 0, False
    for line in lines:
        if not line.is_finite:
            in_a_row += 1
        elif line.has_gradient:
            in_a_row, is_decided = 0, True
    return in_a_row, is_decided


def _keep(path: Path, wanted: Callable[[bytes], bool]) -> None:
    """Keep only the wanted lines."""
    temporary = path.with_suffix(".tmp")
    with writing(str(path)):
        with temporary.open("wb") as file:
            file.writelines(line for line in complete_lines(path) if wanted(line))
        temporary.replace(path)


def _append(path: Path, line: dict[str, Any]) -> None:
    with writing(str(path)), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")

"""Sends the steps and evaluations of a run to its trackers, each once, across restarts.

Owns the names of the values, the run's id and `tracking/` in its folder. The x axis is the number of steps trained by
then: a step's own number, which is its id plus 1. Invariant: names are those of `steps.jsonl`,
nested ones joined by "/", and the table `samples` has the lines of `samples.jsonl`; a step that was trained again after
a restart is not tracked again; steps that an earlier life wrote only to its files, for example without this tracker,
are tracked at the start.
"""

import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import Counter

from penstock.config import Config
from penstock.config.shown import masked
from penstock.contracts.vocabulary import MAIN_SET
from penstock.durable import write_durably, writing
from penstock.records.figures import set_of
from penstock.records.step_numbers import number_of
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.records import EvalResult, Histogram, StepLine
from penstock_trainer.telemetry.samples import SampleFile
from penstock_trainer.telemetry.tracker_feed import Entry, Feed, TrackerPosition, read_position
from penstock_trainer.telemetry.trackers import TrackedRun, Tracker, make_trackers

log = logging.getLogger(__name__)

FOLDER = "tracking"
ID_FILE = "run_id"
HISTOGRAMS = "histograms"
NO_CURVE = ("step", "steps", "started_at", "ended_at")  # the x axis, and the time of day
# Names without a bound; what never changes, is no curve.
NO_CURVES = ("failures", "success", "num_trained", "samples_per_prompt", HISTOGRAMS)


class Tracking:
    """All trackers of a run, if there are any."""

    def __init__(self, feeds: Sequence[Feed], progress: Progress, samples: SampleFile, close_seconds: float) -> None:
        self._feeds = feeds
        self._samples = samples
        self._close_seconds = close_seconds
        self._closed = False
        self._last_step = progress.highest_step
        self._evaluated = set(unique_evals(progress)) if feeds else set()

    def start(self) -> None:
        for feed in self._feeds:
            feed.start()

    def step(self, line: StepLine) -> None:
        """Track a step, unless it has been. Never waits."""
        if line.step <= self._last_step:
            return
        self._last_step = line.step
        self._put(step_entry(asdict(line), self._position, self._samples))

    def evaluation(self, result: EvalResult) -> None:
        """Track an evaluation, unless there was one of its set after as many steps. Never waits."""
        if (result.set, result.steps) in self._evaluated:
            return
        self._evaluated.add((result.set, result.steps))
        self._put(eval_entry(asdict(result), self._position))

    def close(self) -> None:
        """Flush and end all trackers within the deadline that they share, once. Blocking: call it in a thread."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + self._close_seconds
        for feed in self._feeds:
            feed.begin_close()
        for feed in self._feeds:
            feed.finish_close(deadline)
        if self._feeds:  # so that the output of libraries at their end is not the last of the log
            log.info("trackers are closed")

    @property
    def _position(self) -> TrackerPosition:
        return TrackerPosition(self._last_step, len(self._evaluated))

    def _put(self, entry: Entry) -> None:
        for feed in self._feeds:
            feed.put(entry)


def make_tracking(config: Config, folder: Path, progress: Progress, samples: SampleFile, dropped: Counter) -> Tracking:
    """The trackers of the configuration, at their positions in the run's `folder`."""
    trackers = make_trackers(config.tracking)
    feeds = [_feed(tracker, config, folder, progress, samples, dropped) for tracker in trackers]
    return Tracking(feeds, progress, samples, config.tracking.close_seconds)


def _feed(
    tracker: Tracker, config: Config, folder: Path, progress: Progress, samples: SampleFile, dropped: Counter
) -> Feed:
    path = folder / FOLDER / f"{tracker.name}.json"
    run_id = kept_id(folder / FOLDER / ID_FILE, config.run.name)
    position = read_position(path)
    run = TrackedRun(run_id, config.run.name, folder, masked(config), first_step=number_of(position.step + 1))
    return Feed(tracker, run, backlog(progress, samples, position, rewinds=tracker.rewinds), path, dropped)


def kept_id(path: Path, run_name: str) -> str:
    """The run's id: its name and random letters, so that a run that replaces another has curves of its own."""
    if not path.exists():
        with writing(str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, f"{run_name}-{secrets.token_hex(4)}\n".encode())
    return path.read_text(encoding="utf-8").strip()


def unique_evals(progress: Progress) -> dict[tuple[str, int], dict[str, Any]]:
    """The first evaluation of each set after each number of steps, in the order in which they were reported."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in progress.evals():
        found.setdefault((set_of(line), line["steps"]), line)
    return found


def backlog(progress: Progress, samples: SampleFile, position: TrackerPosition, *, rewinds: bool) -> Iterator[Entry]:
    """The entries that a tracker at `position` lacks, evaluations after the step that came before them.

    A tracker that `rewinds` has lost the evaluations from the step after its last one on.
    """
    lacking: list[tuple[int, bool, dict[str, Any], int]] = []
    for line in progress.steps_after(position.step):
        lacking.append((number_of(line["step"]), True, line, position.num_evals))
    for number, line in enumerate(unique_evals(progress).values()):
        if number >= position.num_evals or (rewinds and line["steps"] > number_of(position.step)):
            lacking.append((line["steps"], False, line, number + 1))
    step, num_evals = position.step, position.num_evals
    for _, is_step, line, evals in sorted(lacking, key=lambda each: (each[0], not each[1])):
        step, num_evals = (line["step"] if is_step else step), max(num_evals, evals)
        reached = TrackerPosition(step, num_evals)
        yield step_entry(line, reached, samples) if is_step else eval_entry(line, reached)


def step_entry(line: Mapping[str, Any], position: TrackerPosition, samples: SampleFile) -> Entry:
    """The curves and histograms of a line of `steps.jsonl` at the number of its step, and the samples of its step."""
    step = line["step"]
    found = msgspec.convert(line.get(HISTOGRAMS, {}), dict[str, Histogram])  # an earlier release wrote none
    histograms = {f"{HISTOGRAMS}/{name}": each for name, each in found.items()}
    return Entry(number_of(step), dict(_curves(line)), position, histograms, partial(samples.of, step))


def eval_entry(line: Mapping[str, Any], position: TrackerPosition) -> Entry:
    """The curves of a line of `evals.jsonl`, under `eval/`; of a set beside the main one, under `eval/<its name>/`."""
    name = set_of(line)
    return Entry(line["steps"], dict(_curves(line, "eval/" if name == MAIN_SET else f"eval/{name}/")), position)


def _curves(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    return _flat({name: value for name, value in line.items() if name not in (*NO_CURVE, *NO_CURVES)}, prefix)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value

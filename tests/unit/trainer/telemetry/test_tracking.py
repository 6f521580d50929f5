"""Tracking: no tracker can delay or end the training, and each gets once what it has missed."""

import logging
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import Counter

from penstock.config import TrackingSection
from penstock.errors import DataError
from penstock_trainer.telemetry import tracker_feed
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.samples import SampleFile
from penstock_trainer.telemetry.tracker_feed import Feed, TrackerPosition, read_position
from penstock_trainer.telemetry.trackers import Point, TrackedRun, Tracker
from penstock_trainer.telemetry.tracking import Tracking, backlog, kept_id
from tests.patience import ANSWER_SECONDS
from tests.unit.trainer.telemetry.tracked_life import EVAL, LINE, Life, count, make_config, make_dropped, wait_for


class FakeTracker:
    """Records its calls; `log` waits for `released`, and raises `error` if there is one."""

    name = "fake"
    rewinds = False

    def __init__(self, *, fails: str = "", blocks: bool = False) -> None:
        self.fails = fails
        self.released = threading.Event()
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.calls: list[str] = []
        if not blocks:
            self.released.set()

    def open(self, run: TrackedRun) -> None:
        self._call("open")

    def log(self, point: Point) -> None:
        self.released.wait()
        self._call("log")
        self.logged.append((point.step, dict(point.values)))

    def close(self) -> None:
        self._call("close")

    def abandon(self) -> None:
        self.calls.append("abandon")

    def has(self, num_steps: int) -> bool:
        return len(self.logged) == num_steps

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            raise RuntimeError(f"no {name}")


def fake_tracking(
    folder: Path, dropped: Counter, *trackers: Tracker, close_seconds: float = ANSWER_SECONDS
) -> Tracking:
    progress = Progress(folder)
    run = TrackedRun("r-1", "r", folder, {}, first_step=0)
    feeds = [Feed(each, run, (), folder / f"{number}.json", dropped) for number, each in enumerate(trackers)]
    tracking = Tracking(feeds, progress, SampleFile(folder), close_seconds)
    tracking.start()
    return tracking


def test_a_tracker_that_hangs_delays_neither_the_loop_nor_the_others_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker_feed, "MAX_WAITING", 10)
    hanging, other, dropped = FakeTracker(blocks=True), FakeTracker(), make_dropped()
    tracking = fake_tracking(tmp_path, dropped, other, hanging, close_seconds=2)  # the deadline of `hanging` passes
    for step in range(30):
        tracking.step(replace(LINE, step=step))
        wait_for(partial(other.has, step + 1))
    assert count(dropped, "slow") == 19  # one is inside the library, ten wait
    tracking.close()
    assert not hanging.released.is_set()
    assert count(dropped, "slow") == 29
    assert hanging.calls == ["open", "abandon"]
    assert [step for step, _ in other.logged] == list(range(1, 31))
    assert other.calls[-1] == "close"
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1
    hanging.released.set()
    tracking._feeds[1]._thread.join()  # it still writes, into a folder that is deleted with the test


@pytest.mark.parametrize("fails", ["open", "log", "close"])
def test_a_tracker_that_raises_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, fails: str) -> None:
    tracker, dropped = FakeTracker(fails=fails), make_dropped()
    tracking = fake_tracking(tmp_path, dropped, tracker)
    for step in range(5):
        tracking.step(replace(LINE, step=step))
    tracking.close()
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert [f"no {fails}" in each.getMessage() for each in warnings] == [True]
    assert count(dropped, "failed") == (0 if fails == "close" else 5)
    assert "abandon" not in tracker.calls
    assert (tmp_path / "0.json").exists() is (fails == "close")


def test_no_trackers_leave_nothing_behind(tmp_path: Path) -> None:
    life = Life(make_config(tmp_path))
    life.step(0)
    life.evaluation(0)
    life.tracking.close()
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [
        "evals.jsonl",
        "samples.jsonl",
        "steps.jsonl",
    ]


def test_a_tracker_turned_on_later_gets_what_was_before(tmp_path: Path) -> None:
    life = Life(make_config(tmp_path))
    life.evaluation(0)
    for step in range(3):
        life.step(step)
    life.evaluation(2)
    entries = list(backlog(Progress(life.folder), SampleFile(life.folder), TrackerPosition(), rewinds=False))
    assert [(each.step, "eval/accuracy" in each.values) for each in entries] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
    ]
    assert [each.position for each in entries] == [
        TrackerPosition(-1, 1),
        TrackerPosition(0, 1),
        TrackerPosition(1, 1),
        TrackerPosition(1, 2),
        TrackerPosition(2, 2),
    ]
    assert [[sample.completion for sample in each.samples()] for each in entries] == [
        [],
        ["3", "at 0"],
        ["3", "at 1"],
        [],
        ["3", "at 2"],
    ]
    assert [dict(each.histograms) for each in entries[:2]] == [
        {},
        {f"histograms/{name}": each for name, each in LINE.histograms.items()},
    ]
    rest = [list(backlog(Progress(life.folder), life.samples, each.position, rewinds=False)) for each in entries]
    assert [len(left) for left in rest] == [4, 3, 2, 1, 0]


def test_a_run_keeps_its_id_and_one_that_replaces_it_has_another(tmp_path: Path) -> None:
    first = kept_id(tmp_path / "a" / "run_id", "r")
    assert first.startswith("r-")
    assert kept_id(tmp_path / "a" / "run_id", "r") == first
    assert kept_id(tmp_path / "b" / "run_id", "r") != first


def test_a_position_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[")
    with pytest.raises(DataError, match=r"x\.json holds no position"):
        read_position(tmp_path / "x.json")


def test_one_name_is_a_list_and_none_is_named_twice() -> None:
    assert TrackingSection.model_validate({"to": "wandb"}).to == ("wandb",)
    with pytest.raises(ValueError, match="expected each tracker once"):
        TrackingSection(to=("wandb", "wandb"))


def test_a_further_set_has_curves_under_its_name(tmp_path: Path) -> None:
    life = Life(make_config(tmp_path))
    life.evaluation(0)
    life.progress.add_eval(replace(EVAL, set="hard"))
    life.evaluation(2)
    entries = list(backlog(Progress(life.folder), SampleFile(life.folder), TrackerPosition(), rewinds=False))
    accuracies = [[name for name in each.values if name.endswith("accuracy")] for each in entries]
    assert accuracies == [["eval/accuracy"], ["eval/hard/accuracy"], ["eval/accuracy"]]
    assert {name.replace("eval/hard/", "eval/") for name in entries[1].values} == set(entries[0].values)
    rest = backlog(Progress(life.folder), SampleFile(life.folder), TrackerPosition(-1, 2), rewinds=False)
    assert [each.step for each in rest] == [2]

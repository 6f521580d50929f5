"""Trackers: what each library holds afterwards, and that none of them can hold up or end the training."""

import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import CollectorRegistry, Counter
from pydantic import SecretStr

from penstock.config import ActorSection, Config, DataSection, DatasetSection, RedisSection, RunSection, TrackingSection
from penstock.errors import ConfigError, DataError
from penstock_trainer import tracker_feed
from penstock_trainer.evaluation import EvalResult
from penstock_trainer.progress import Progress, StepLine
from penstock_trainer.tracker_feed import Feed, Position, read_position
from penstock_trainer.trackers import TrackedRun, Tracker, WandbTracker, require_trackers
from penstock_trainer.tracking import Tracking, backlog, kept_id, make_tracking

LINE = StepLine(
    step=0,
    version=1,
    epoch=0.1,
    tickets=(0, 1),
    started_at=100.0,
    ended_at=102.0,
    seconds={"step": 2.0, "wait": 0.5},
    generation_seconds=1.6,
    generated_tokens=32,
    reward_mean=0.0,
    staleness_max=1,
    staleness_mean=0.5,
    statistics={"loss": 0.25, "masked_non_finite": 0.0},
)
NAMES = {
    *("version", "epoch", "seconds/step", "seconds/wait", "generation_seconds", "generated_tokens", "reward_mean"),
    *("staleness_max", "staleness_mean", "statistics/loss", "statistics/masked_non_finite"),
}
EVAL = EvalResult(0, 0.5, 0.5, 4, 0, 0, 0, ())
EVAL_NAMES = {f"eval/{name}" for name in ("accuracy", "reward_mean", "num_prompts", "num_failed")} | {
    "eval/oldest_version",
    "eval/newest_version",
}
SECRETS = ("pa55", "tok3n")


def make_config(root: Path, *to: str, **tracking: object) -> Config:
    return Config(
        run=RunSection(name="r", root=str(root)),
        actor=ActorSection(path="model"),
        data=DataSection(train=DatasetSection(path="train.jsonl")),
        redis=RedisSection(url="redis://:pa55@db:6379/0", password=SecretStr("pa55")),
        token=SecretStr("tok3n"),
        tracking=TrackingSection.model_validate({"to": to, **tracking}),
    )


def make_dropped() -> Counter:
    return Counter("dropped", "Dropped", ("tracker", "reason"), registry=CollectorRegistry())


def count(dropped: Counter, reason: str = "") -> float:
    """What has been dropped for the reason; without one, for any."""
    samples = [each for metric in dropped.collect() for each in metric.samples if each.name == "dropped_total"]
    return sum(each.value for each in samples if reason in ("", each.labels["reason"]))


class Life:
    """One life of a trainer: its progress files and its trackers."""

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run.root) / config.run.name
        self.progress = Progress(self.folder)
        self.dropped = make_dropped()
        self.tracking = make_tracking(config, self.folder, self.progress, self.dropped)
        self.tracking.start()

    def step(self, step: int, *, tracked: bool = True) -> None:
        line = replace(LINE, step=step, reward_mean=step / 8)
        self.progress.add_step(line)
        if tracked:
            self.tracking.step(line)

    def evaluation(self, steps: int) -> None:
        result = replace(EVAL, steps=steps, accuracy=steps / 4)
        self.progress.add_eval(result)
        self.tracking.evaluation(result)


def two_lives(config: Config) -> None:
    """Steps 0 to 5 and three evaluations; the first life is killed after step 2, before its trackers have step 3."""
    first = Life(config)
    first.evaluation(0)
    for step in range(3):
        first.step(step)
    first.evaluation(2)
    first.evaluation(3)
    first.tracking.close()
    first.step(3, tracked=False)
    assert count(first.dropped) == 0
    second = Life(config)
    for step in (2, 3, 4, 5):  # two of them are trained again
        second.step(step)
    second.evaluation(3)
    second.tracking.close()
    assert count(second.dropped) == 0


EXPECTED_REWARDS = [(step, step / 8) for step in range(6)]
EXPECTED_ACCURACIES = [(0, 0.0), (2, 0.5), (3, 0.75)]


def test_tensorboard_holds_each_value_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_lives(make_config(tmp_path, "tensorboard"))
    found = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == NAMES | EVAL_NAMES
    assert [(each.step, each.value) for each in found.Scalars("reward_mean")] == EXPECTED_REWARDS
    assert [(each.step, each.value) for each in found.Scalars("eval/accuracy")] == EXPECTED_ACCURACIES
    assert [(each.step, each.value) for each in found.Scalars("statistics/loss")] == [(n, 0.25) for n in range(6)]
    text = found.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "group_size: 8" in text
    assert_no_secrets(tmp_path)


def test_tensorboard_takes_back_what_was_written_but_not_recorded(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tmp_path, "tensorboard")
    two_lives(config)
    position = tmp_path / "r" / "tracking" / "tensorboard.json"
    assert read_position(position) == Position(5, 3)
    position.write_text('{"step": 1, "num_evals": 3}')  # as if killed at once after all these were written
    third = Life(config)
    third.step(6)
    third.tracking.close()
    found = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    found.Reload()
    assert [each.step for each in found.Scalars("reward_mean")] == list(range(7))
    assert [(each.step, each.value) for each in found.Scalars("eval/accuracy")] == EXPECTED_ACCURACIES


def test_wandb_offline_writes_a_file_that_holds_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("sys.argv", ["trainer", "--redis.password", "pa55"])
    two_lives(make_config(tmp_path, "wandb"))
    records = [
        each
        for path in sorted((tmp_path / "r" / "wandb").glob("offline-run-*/*.wandb"))
        for each in wandb_records(path)
    ]
    runs = [each.run for each in records if each.WhichOneof("record_type") == "run"]
    kept = kept_id(tmp_path / "r" / "tracking" / "run_id", "r")
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {(kept, "r", "penstock")}
    metrics = [each.metric for each in records if each.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in {(metric.glob_name, metric.step_metric) for metric in metrics}
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in each.history.item}
        for each in records
        if each.WhichOneof("record_type") == "history"
    ]
    assert {name for row in rows for name in row if not name.startswith("_")} == NAMES | EVAL_NAMES | {"step"}
    assert [(row["step"], row["reward_mean"]) for row in rows if "reward_mean" in row] == EXPECTED_REWARDS
    assert [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row] == EXPECTED_ACCURACIES
    assert_no_secrets(tmp_path)
    assert wandb_processes() == []


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of W&B's file: a header of 7 bytes, then a log in the format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
            parts = b""


def wandb_processes() -> list[str]:
    return [each.name() for each in psutil.Process().children(recursive=True) if each.name().startswith("wandb")]


HANGING = """
import logging, sys, time
from pathlib import Path
import psutil
from tests.unit import test_trainer_trackers as t

logging.basicConfig(level="WARNING")
root = Path(sys.argv[1])
life = t.Life(t.make_config(root, "wandb", close_seconds=1))
life.step(0)
t.wait_for((root / "r" / "tracking" / "wandb.json").exists)
for child in psutil.Process().children():
    if child.name() == "wandb-core":
        child.suspend()
        print(child.pid)
life.tracking.close()
"""


def test_a_service_of_wandb_that_hangs_is_killed_and_the_process_ends(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert "did not end within tracking.close_seconds" in ended.stderr
    assert not psutil.pid_exists(int(ended.stdout))


def test_trackio_holds_the_values_in_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio")
    import trackio.sqlite_storage as storage
    import trackio.utils

    for module in (trackio, storage, trackio.utils):  # what TRACKIO_DIR is when trackio is imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.run._get_default_namespace", lambda: "nobody")  # asks the hub where a token is stored
    two_lives(make_config(tmp_path, "trackio", project="p"))
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        found = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = database.execute("select config from configs").fetchall()
    database.close()
    kept = kept_id(tmp_path / "r" / "tracking" / "run_id", "r")
    assert {name for name, _, _ in found} == {kept}
    rows = [(step, json.loads(values)) for _, step, values in found]
    assert {name for _, values in rows for name in values} == NAMES | EVAL_NAMES
    assert [(step, values["reward_mean"]) for step, values in rows if "reward_mean" in values] == EXPECTED_REWARDS
    assert [(step, each["eval/accuracy"]) for step, each in rows if "eval/accuracy" in each] == EXPECTED_ACCURACIES
    assert json.loads(configs[0][0])["actor"]["group_size"] == 8
    assert_no_secrets(tmp_path)


def assert_no_secrets(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files for secret in SECRETS if secret.encode() in path.read_bytes()] == []


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.01)


class FakeTracker:
    """Records what it is told; `log` waits for `released` and raises what it is told to."""

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

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.released.wait(60)
        self._call("log")
        self.logged.append((step, dict(values)))

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


def fake_tracking(folder: Path, dropped: Counter, *trackers: Tracker, close_seconds: float = 5.0) -> Tracking:
    progress = Progress(folder)
    run = TrackedRun("r-1", "r", folder, {}, first_step=0)
    feeds = [Feed(each, run, (), folder / f"{number}.json", dropped) for number, each in enumerate(trackers)]
    tracking = Tracking(feeds, progress, close_seconds)
    tracking.start()
    return tracking


def test_a_tracker_that_hangs_delays_neither_the_loop_nor_the_others_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracker_feed, "MAX_WAITING", 10)
    hanging, other, dropped = FakeTracker(blocks=True), FakeTracker(), make_dropped()
    tracking = fake_tracking(tmp_path, dropped, hanging, other, close_seconds=0.5)
    start = time.monotonic()
    for step in range(30):
        tracking.step(replace(LINE, step=step))
        wait_for(partial(other.has, step + 1))
    assert time.monotonic() - start < 5
    assert count(dropped, "slow") == 19  # one is inside the library, ten wait
    start = time.monotonic()
    tracking.close()
    assert 0.4 < time.monotonic() - start < 3
    assert count(dropped, "slow") == 29
    assert hanging.calls == ["open", "abandon"]
    assert [step for step, _ in other.logged] == list(range(30))
    assert other.calls[-1] == "close"
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1
    hanging.released.set()


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
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["evals.jsonl", "steps.jsonl"]


def test_a_tracker_turned_on_later_gets_what_was_before(tmp_path: Path) -> None:
    life = Life(make_config(tmp_path))
    life.evaluation(0)
    for step in range(3):
        life.step(step)
    life.evaluation(2)
    entries = list(backlog(Progress(life.folder), Position(), rewinds=False))
    assert [(each.step, "eval/accuracy" in each.values) for each in entries] == [
        (0, True),
        (0, False),
        (1, False),
        (2, True),
        (2, False),
    ]
    assert [each.position for each in entries] == [
        Position(-1, 1),
        Position(0, 1),
        Position(1, 1),
        Position(1, 2),
        Position(2, 2),
    ]
    rest = [list(backlog(Progress(life.folder), each.position, rewinds=False)) for each in entries]
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


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_an_error_that_names_extra_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=rf"tracking\.to names {name}.*penstock\[{name}\]"):
        require_trackers(TrackingSection(to=(name,)))
    (tmp_path / name).mkdir()  # such as the folder in which W&B keeps its runs
    with pytest.raises(ConfigError, match="is not installed"):
        require_trackers(TrackingSection(to=(name,)))
    (tmp_path / name / "__init__.py").touch()
    require_trackers(TrackingSection(to=(name,)))


def test_wandb_online_needs_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    require_trackers(TrackingSection(to=("wandb",)))
    try:
        with pytest.raises(ConfigError, match=r"tracking\.wandb_mode is online"):
            require_trackers(TrackingSection(to=("wandb",), wandb_mode="online"))
    finally:
        wandb.teardown()
    assert wandb_processes() == []


def test_one_name_is_a_list_and_none_is_named_twice() -> None:
    assert TrackingSection.model_validate({"to": "wandb"}).to == ("wandb",)
    with pytest.raises(ValueError, match="expected each tracker once"):
        TrackingSection(to=("wandb", "wandb"))


def test_abandoning_a_tracker_that_never_opened_does_nothing() -> None:
    WandbTracker(TrackingSection()).abandon()

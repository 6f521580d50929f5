"""Trackers: what each library has recorded, what it needs to start, and that it ends."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.config import Config, TrackingSection
from penstock.errors import ConfigError
from penstock_trainer.telemetry.tracker_feed import TrackerPosition, read_position
from penstock_trainer.telemetry.trackers import WandbTracker, require_trackers
from penstock_trainer.telemetry.tracking import kept_id
from tests.patience import START_SECONDS
from tests.unit.trainer.telemetry.tracked_life import EVAL_NAMES, HISTOGRAMS, NAMES, SECRETS, Life, count, make_config


def two_lives(config: Config) -> None:
    """Steps 1 to 6 and three evaluations; the first life is killed after step 3, before its trackers have step 4."""
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


EXPECTED_REWARDS = [(step + 1, step / 8) for step in range(6)]
EXPECTED_ACCURACIES = [(0, 0.0), (2, 0.5), (3, 0.75)]


def test_tensorboard_holds_each_value_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_lives(make_config(tmp_path, "tensorboard"))
    found = EventAccumulator(str(tmp_path / "r" / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    found.Reload()
    assert set(found.Tags()["scalars"]) == NAMES | EVAL_NAMES
    assert [(each.step, each.value) for each in found.Scalars("reward_mean")] == EXPECTED_REWARDS
    assert [(each.step, each.value) for each in found.Scalars("eval/accuracy")] == EXPECTED_ACCURACIES
    assert [(each.step, each.value) for each in found.Scalars("statistics/loss")] == [(n, 0.25) for n in range(1, 7)]
    assert set(found.Tags()["histograms"]) == HISTOGRAMS
    histograms = found.Histograms("histograms/reward")
    assert [each.step for each in histograms] == list(range(1, 7))
    assert (histograms[0].histogram_value.bucket, histograms[0].histogram_value.num) == ([3.0, 0.0, 1.0], 4.0)
    tables = [(each.step, each.tensor_proto.string_val[0].decode()) for each in found.Tensors("samples/text_summary")]
    assert [step for step, table in tables if f"| at {step - 1} |" in table] == list(range(1, 7))
    assert "| 1 &#124; 2<br>&lt;b&gt;? |" in tables[0][1]
    assert "| mine:f 0.5, judge failed |" in tables[0][1]
    text = found.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "group_size: 8" in text
    assert_no_secrets(tmp_path)


def test_tensorboard_takes_back_what_was_written_but_not_recorded(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(tmp_path, "tensorboard")
    two_lives(config)
    position = tmp_path / "r" / "tracking" / "tensorboard.json"
    assert read_position(position) == TrackerPosition(5, 3)
    position.write_text('{"step": 1, "num_evals": 3}')  # as if killed at once after all these were written
    third = Life(config)
    third.step(6)
    third.tracking.close()
    found = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    found.Reload()
    assert [each.step for each in found.Scalars("reward_mean")] == list(range(1, 8))
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
    objects = HISTOGRAMS | {"samples"}
    names = {name.rpartition("/")[0] if name.rpartition("/")[0] in objects else name for row in rows for name in row}
    assert {name for name in names if not name.startswith("_")} == NAMES | EVAL_NAMES | objects | {"step"}
    counts = [(row["histograms/reward/values"], row["samples/nrows"]) for row in rows if "reward_mean" in row]
    assert counts == [([3, 0, 1], 2)] * 6
    tables = [json.loads(path.read_bytes()) for path in (tmp_path / "r" / "wandb").rglob("*.table.json")]
    completion = tables[0]["columns"].index("completion")
    assert sorted(table["data"][1][completion] for table in tables) == [f"at {step}" for step in range(6)]
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
        if kind in (1, 4):  # a full record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
            parts = b""


def wandb_processes() -> list[str]:
    return [each.name() for each in psutil.Process().children(recursive=True) if each.name().startswith("wandb")]


HANGING = """
import logging, sys, time
from pathlib import Path
import psutil
from tests.unit.trainer.telemetry import tracked_life as t

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
        [sys.executable, "-c", HANGING, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
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
    monkeypatch.setattr("trackio.run._get_default_namespace", lambda: "nobody")  # asks the hub if a token is stored
    two_lives(make_config(tmp_path, "trackio", project="p"))
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        found = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        configs = database.execute("select config from configs").fetchall()
    database.close()
    kept = kept_id(tmp_path / "r" / "tracking" / "run_id", "r")
    assert {name for name, _, _ in found} == {kept}
    rows = [(step, json.loads(values)) for _, step, values in found]
    assert {name for _, values in rows for name in values} == NAMES | EVAL_NAMES | HISTOGRAMS | {"samples"}
    tables = [(step, values["samples"]["_value"]) for step, values in rows if "samples" in values]
    assert [(step, table[1]["completion"]) for step, table in tables] == [(step + 1, f"at {step}") for step in range(6)]
    assert tables[0][1][0]["rewards"] == "mine:f 0.5, judge failed"
    [first, *_] = [values["histograms/reward"] for _, values in rows if "histograms/reward" in values]
    assert (first["_type"], first["values"]) == ("trackio.histogram", [3, 0, 1])
    assert [(step, values["reward_mean"]) for step, values in rows if "reward_mean" in values] == EXPECTED_REWARDS
    assert [(step, each["eval/accuracy"]) for step, each in rows if "eval/accuracy" in each] == EXPECTED_ACCURACIES
    assert json.loads(configs[0][0])["actor"]["group_size"] == 8
    assert_no_secrets(tmp_path)


def assert_no_secrets(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files for secret in SECRETS if secret.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_is_an_error_that_names_extra_and_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ConfigError, match=rf"tracking\.to names {name}.*penstock\[{name}\]"):
        require_trackers(TrackingSection(to=(name,)))
    (tmp_path / name).mkdir()  # for example the folder of W&B's runs
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


def test_abandoning_a_tracker_that_never_opened_does_nothing() -> None:
    WandbTracker(TrackingSection()).abandon()

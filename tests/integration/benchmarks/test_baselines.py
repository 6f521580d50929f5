"""The runner of launched tasks: runs that share an engine and a queue, one after the other, and a run that goes on."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml

from benchmarks.baselines.cells import Cell
from benchmarks.baselines.launched import measure as launched
from benchmarks.baselines.launched.tasks import OWN_LOSS, TASKS, Task
from benchmarks.baselines.lines import LaunchedLine, read_lines
from benchmarks.chaos.launch import ROOT
from benchmarks.chaos.model import make_tiny_model, write_prompts
from benchmarks.chaos.parts import make_pure_engine
from penstock.records.files import STEPS_FILE
from tests.patience import START_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 3
PACE = "pace"  # the file that says how many seconds each reward takes
REWARD = "benchmarks.chaos.chaos_rewards:share_of_early_letters"
CELLS = [Cell(OWN_LOSS, 1, seed, "letters") for seed in (1, 2)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A task of three steps with the pure engine, which stands in for SGLang, and a model of letters."""
    make_tiny_model(tmp_path / "model")
    write_prompts(tmp_path / "rows.jsonl", 4, tmp_path / PACE)
    engine = {"python": str(make_pure_engine(tmp_path, 0.001)), "dtype": "float32", "max_running_requests": 16}
    document = {
        "run": {"name": "letters", "max_steps": NUM_STEPS},
        "actor": {"path": str(tmp_path / "model"), "group_size": 2, "dtype": "float32"},
        "total_train_epochs": 3,
        "sampling": {"max_new_tokens": 4},
        "data": {
            "batch_size": 2,
            "train": {"path": str(tmp_path / "rows.jsonl")},
            "eval": {"path": str(tmp_path / "rows.jsonl")},
        },
        "eval": {"every_steps": 2},
        "reward": {"functions": {REWARD: 1.0}, "modules_path": str(ROOT), "timeout_seconds": 60},
        "rollout": {"engine": engine},
        "weights": {"canary_tokens": 0},  # the pure engine does not compute the model
    }
    path = tmp_path / "letters.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_runs_share_an_engine_and_what_has_a_line_is_not_launched_again(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "letters", Task((str(config),), num_seeds=2))
    path = tmp_path / "lines.jsonl"
    said: list[str] = []

    def measure(cells: list[Cell]) -> int:
        return launched.measure(cells, tmp_path / "runs", lambda _: path, said.append, rows="", shared=True)

    assert measure(CELLS[:1]) == 1
    assert measure(CELLS) == 1
    assert measure(CELLS) == 0
    lines = read_lines(path, LaunchedLine)
    assert list(lines) == CELLS
    for cell, line in lines.items():
        assert (line.num_steps, len(line.reward), [steps for steps, _ in line.held_out]) == (3, 3, [0, 2, 3])
        assert line.configuration == launched.digest(cell)
        assert list(line.held_out_rewards) == [REWARD]
        assert line.tokens > 0
        assert line.cpu_seconds > 1
    assert lines[CELLS[0]].configuration != lines[CELLS[1]].configuration
    assert said == [f"1 of 1: {CELLS[0]}", f"1 of 1: {CELLS[1]}"]


def test_a_launch_that_fails_is_named_with_what_it_said(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Task((str(config),), {"data.train.path": str(tmp_path / "none.jsonl")})
    monkeypatch.setitem(TASKS, "letters", broken)
    with pytest.raises(launched.RunFailedError, match=r"letters, own, lag 1, seed 1 ended with 2(?s:.*)none\.jsonl"):
        launched.measure(CELLS[:1], tmp_path / "runs", lambda _: tmp_path / "l.jsonl", print, rows="", shared=True)
    assert not (tmp_path / "l.jsonl").exists()


def test_a_run_of_another_configuration_does_not_go_on(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "letters", Task((str(config),)))
    run = tmp_path / "runs" / launched.folder_name(CELLS[0])
    run.parent.mkdir()
    run.with_suffix(launched.DIGEST).write_text("0123456789abcdef")
    with pytest.raises(launched.RunFailedError, match="was begun with the configuration 0123456789abcdef"):
        launched.measure(CELLS[:1], tmp_path / "runs", lambda _: tmp_path / "l.jsonl", print, rows="", shared=True)


def stop_after_a_step(run: Path) -> None:
    """Stop the launcher of a run in order, as soon as it has trained a step."""
    deadline = time.monotonic() + START_SECONDS
    while not (run / STEPS_FILE).exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (launcher,) = (each for each in psutil.Process().children() if "penstock_launch" in each.cmdline())
    launcher.terminate()


def test_a_run_that_was_stopped_goes_on_over_another_engine(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "letters", Task((str(config),)))
    path, run = tmp_path / "lines.jsonl", tmp_path / "runs" / launched.folder_name(CELLS[0])

    def measure() -> int:
        return launched.measure(CELLS[:1], tmp_path / "runs", lambda _: path, print, rows="", shared=False)

    (tmp_path / PACE).write_text("3")
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop_after_a_step, run)
        with pytest.raises(launched.RunFailedError, match="ended with 143"):
            measure()
        stopped.result()
    assert not path.exists()
    trained = len((run / STEPS_FILE).read_text().splitlines())
    assert 1 <= trained < NUM_STEPS
    (tmp_path / PACE).write_text("0")
    assert measure() == 1
    (line,) = read_lines(path, LaunchedLine).values()
    assert (line.num_steps, [steps for steps, _ in line.held_out]) == (3, [0, 2, 3])
    lives = json.loads(run.with_suffix(launched.CPU_SECONDS).read_text())
    assert len(lives) == 2
    assert line.cpu_seconds == pytest.approx(sum(lives), abs=0.1)

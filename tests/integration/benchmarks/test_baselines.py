"""The runner of launched tasks: runs that share an engine and a queue, one after the other, and a run that goes on."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.baselines.cells import Cell
from benchmarks.baselines.launched import measure as launched
from benchmarks.baselines.launched.tasks import OWN_LOSS, TASKS, Task
from benchmarks.baselines.lines import LaunchedLine, read_lines
from benchmarks.chaos.model import make_tiny_model
from benchmarks.chaos.parts import make_pure_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 3
CELLS = [Cell(OWN_LOSS, 1, seed, "letters") for seed in (1, 2)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A task of three steps with the pure engine, which stands in for SGLang, and a model of letters."""
    make_tiny_model(tmp_path / "model")
    rows = [json.dumps({"prompt": f"{number}+1=", "answer": "a"}) + "\n" for number in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
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
        assert list(line.held_out_rewards) == ["exact_match"]
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

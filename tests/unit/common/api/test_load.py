"""`penstock.load`: the configuration of files and of keys that Python sets."""

from pathlib import Path

import pytest

import penstock
from penstock.config.load import load_config


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {name: r}\nactor: {path: m}\ndata: {train: {path: d.jsonl}}\noptimizer: {lr: 1.0e-6, warmup_steps: 5}\n"
    )
    return path


def test_keys_win_over_variables_and_files(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("actor: {group_size: 4}\n")
    monkeypatch.setenv("PENSTOCK_RUN__SEED", "3")
    monkeypatch.setenv("PENSTOCK_OPTIMIZER__LR", "3e-6")
    config = penstock.load([file, str(other)], {"optimizer.lr": 2e-6, "reward.functions.my.module:score": 0.5})
    assert (config.optimizer.lr, config.optimizer.warmup_steps, config.run.seed) == (2e-6, 5, 3)
    assert config.actor.group_size == 4
    assert config.reward.functions["my.module:score"] == 0.5


def test_values_are_values_and_no_text(file: Path) -> None:
    keys = {"run.name": "7", "sampling.stop": ["\n"], "actor.path": Path("models") / "m", "optimizer": {"lr": 2e-6}}
    config = penstock.load(file, keys)
    words = ["--config", str(file), "--run.name", "7", "--sampling.stop", '["\\n"]', "--actor.path", "models/m"]
    assert config == load_config([*words, "--optimizer.lr", "2e-6"], {})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"optimizer.learning_rate": 1e-6}, r"optimizer\.learning_rate: no such key.*optimizer\.lr"),
        ({"optimizer": {"lrr": 1e-6}}, r"optimizer\.lrr"),
        ({"optimizer.lr": "fast"}, r"optimizer\.lr: saw 'fast'"),
        ({"token": 5}, "token: saw a secret"),
    ],
)
def test_errors_are_those_of_the_command_line(file: Path, keys: dict[str, object], message: str) -> None:
    with pytest.raises(penstock.ConfigError, match=message):
        penstock.load(file, keys)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(penstock.ConfigError, match=r"none\.yaml: cannot be read"):
        penstock.load(tmp_path / "none.yaml")

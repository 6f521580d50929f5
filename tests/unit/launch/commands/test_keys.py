"""`penstock keys`, `--version` and the forms of `penstock config`, as their user sees them."""

import contextlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.config.load import build_config
from penstock.config.reference.described import described_keys
from penstock.errors import ConfigError
from penstock_launch.__main__ import run
from penstock_launch.commands.keys import show_keys
from penstock_launch.commands.show_config import schema

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def fits_schema() -> Callable[[Any], bool]:
    jsonschema = pytest.importorskip("jsonschema", reason="it comes with Ray, an extra")
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    return lambda document: bool(validator.is_valid(document))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"penstock {version('penstock')}\n"


def test_one_key_is_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "learning_rate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["optimizer.lr: number, > 0; default 1e-06", "    Learning rate after warm-up."]
    assert "    TRL: learning_rate" in lines


def test_several_keys_have_two_lines_each_that_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert run(["keys", "temperature"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sampling.temperature: number, > 0; default 1"
    assert lines[1] == "    Softmax temperature, at least 0.01; log-probabilities are taken..."
    assert all(line.startswith("    ") for line in lines[1::2])


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["temprature"], 1, "no key has 'temprature'; did you mean sampling.temperature or eval.temperature?"),
        (["temperature", "qq"], 1, "no key has 'temperature' and 'qq'"),
        (["--lr"], 2, "saw '--lr'; expected penstock keys WORD ..."),
    ],
)
def test_what_is_not_found_ends_with_a_hint(
    capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str
) -> None:
    assert run(["keys", *words]) == code
    shown = capsys.readouterr()
    assert text in shown.err
    assert shown.out == ""


def test_every_key_can_be_shown() -> None:
    for key in described_keys():
        assert show_keys([key.name])[1] == f"    {key.meaning}"


def test_changed_and_schema(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [each for each in os.environ if each.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)
    file = tmp_path / "config.yaml"
    file.write_text("actor: {path: m, group_size: 8}\ndata: {train: {path: d}}\noptimizer: {lr: 0.5}\n")
    assert run(["config", "--config", str(file), "--changed", "--token", "hush"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "# Secrets are left out; set them again: token."
    assert yaml.safe_load(text) == {
        "actor": {"path": "m"}, "optimizer": {"lr": 0.5}, "data": {"train": {"path": "d"}}
    }  # fmt: skip
    assert run(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["actor"]
    assert run(["config", "--schema", "--config", str(file)]) == 2


@pytest.mark.parametrize("file", sorted(ROOT.glob("examples/*/config.yaml")), ids=lambda file: file.parent.name)
def test_the_schema_accepts_the_examples(fits_schema: Callable[[Any], bool], file: Path) -> None:
    assert fits_schema(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    ("document", "fits"),
    [
        ({"trainer": {"gpus": 0}, "rollout": {"gpus": "0,1"}, "tracking": {"to": "wandb"}}, True),
        ({"trainer": {"gpus": [0, "GPU-1"]}, "rollout": {"gpus": None}, "tracking": {"to": ["wandb"]}}, True),
        ({"optimizer": {"learning_rate": 1}}, False),
        ({"optimizer": {"lr": -1}}, False),
        ({"loss": {"surrogate": "ppo2"}}, False),
        ({"tracking": {"to": "mlflow"}}, False),
    ],
)
def test_the_schema_takes_what_the_reader_takes(
    fits_schema: Callable[[Any], bool], document: dict[str, Any], fits: bool
) -> None:
    full = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}, **document}
    assert fits_schema(full) is fits
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError):
        build_config(full, [], {})

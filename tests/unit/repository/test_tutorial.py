"""What the tutorial shows beside commands (those: test_doc_commands): files, a reward, a configuration, a program."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from penstock.config.load import load_config
from penstock_launch.init.command import SMALL_MODEL, init
from tests.real_model import real_model
from tests.unit.repository.test_repository import ROOT

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def block(language: str, holds: str) -> str:
    """The one block that holds this text."""
    blocks = [each["text"] for each in BLOCK.finditer(TUTORIAL) if each["language"] == language]
    [found] = [text for text in blocks if holds in text]
    return found


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that `penstock init` writes."""
    folder = tmp_path / "my-task"
    init(folder, {}, model=SMALL_MODEL, agent=False)
    monkeypatch.chdir(folder)
    return folder


def test_the_files_are_those_that_init_writes(task: Path) -> None:
    assert len(list(task.iterdir())) == 5
    assert json.loads(block("json", "prompt")) == json.loads((task / "train.jsonl").read_text().splitlines()[0])


def test_the_reward_wants_a_sentence_and_grades_the_rest(task: Path) -> None:
    names: dict[str, Any] = {}
    exec((task / "rewards.py").read_text() + "\n\n" + block("python", "def sentence"), names)
    worth = [names["sentence"]("", text, "apple", {}) for text in ("apple", "Apple", " Apple.")]
    assert worth == sorted(set(worth))
    assert worth[-1] == 1.0
    assert worth[-2] < 0.5


def test_the_configuration_is_another_run_with_this_reward(task: Path) -> None:
    (task / "own.yaml").write_text(block("yaml", "rewards:sentence"))
    config = load_config(["--config", "config.yaml", "--config", "own.yaml"], {})
    assert (config.run.name, dict(config.reward.functions)) == ("sentences", {"rewards:sentence": 1.0})
    assert "`runs/sentences/final`" in TUTORIAL
    steps = 24 // config.data.batch_size * config.total_train_epochs
    assert f"{steps} steps of {config.data.batch_size} prompts with {config.actor.group_size}\ncompletions" in TUTORIAL


def test_the_chat_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").symlink_to(real_model())
    monkeypatch.chdir(tmp_path)
    exec(block("python", "# chat.py"), {})
    assert capsys.readouterr().out.strip()

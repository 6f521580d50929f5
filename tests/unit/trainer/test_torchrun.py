"""The ranks' command with one rank: the process becomes the trainer itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.patience import START_SECONDS


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration whose prompts are absent: the trainer ends before it imports torch."""
    path = tmp_path / "config.yaml"
    document = {"run": {"name": "t"}, "actor": {"path": "absent"}, "data": {"train": {"path": "prompts.jsonl"}}}
    path.write_text(yaml.safe_dump(document))
    return path


def ended(module: str, config: Path) -> tuple[int, str]:
    """The exit code and the last words of a trainer."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    ran = subprocess.run(
        [sys.executable, "-m", module, "--config", str(config)],
        cwd=config.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    return ran.returncode, ran.stderr


def test_one_rank_ends_as_the_trainer_does(config: Path) -> None:
    code, words = ended("penstock_trainer.torchrun", config)
    assert code == 2
    assert "prompts.jsonl" in words
    assert (code, words) == ended("penstock_trainer", config)


def test_several_ranks_say_which_one_ended(config: Path) -> None:
    config.write_text(config.read_text() + "trainer: {num_ranks: 2}\n")
    code, words = ended("penstock_trainer.torchrun", config)
    assert code == 2
    assert "prompts.jsonl" in words
    assert "trainer: rank 0 of 2 ended: exit code 2" in words

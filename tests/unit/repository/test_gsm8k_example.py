"""The GSM8K example: its rewards, its rows, its configurations, and the table of AReaL's keys."""

import re
from pathlib import Path

import pytest

from examples.gsm8k.marks import marked, strict
from penstock.config import Config
from penstock.config.keys import flat
from penstock.config.load import load_config
from penstock_reward.functions.text import gsm8k
from tests.gsm8k_run import EXAMPLE, ROOT, ROWS

ANSWER = "There are 21 x 60 = <<21*60=1260>>1,260 of them.\n#### 1,260"


@pytest.mark.parametrize(
    ("completion", "scores"),
    [
        ("21 times 60 is 1260.\n#### 1260", (1, 1, 1)),
        ("21 times 60 is 1260.\n#### 1,260.", (1, 1, 1)),
        ("The answer is 1260.", (1, 0, 0)),
        ("#### 1260\nThat is all.", (1, 1, 0)),
        ("#### 12", (0, 0, 1)),
        ("#### 12\n#### 1260", (0, 0, 1)),
        ("####", (0, 0, 0)),
        ("", (0, 0, 0)),
    ],
)
def test_the_rewards_are_lenient_strict_and_of_the_mark(completion: str, scores: tuple[int, int, int]) -> None:
    assert tuple(reward("", completion, ANSWER, {}) for reward in (gsm8k, strict, marked)) == scores


def test_the_answer_of_a_row_is_right_by_each_reward() -> None:
    assert [reward("", ANSWER, ANSWER, {}) for reward in (gsm8k, strict, marked)] == [1, 1, 1]


def test_a_folder_of_rows_gives_both_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from penstock_trainer.data.datasets import load_rows

    words = ["--data.train.path", str(ROWS), "--data.eval.path", str(ROWS), "--data.eval.size", "3"]
    config = load_config(["--config", str(EXAMPLE / "config.yaml"), *words], {})
    assert config.data.eval is not None
    train, test = load_rows(config.data.train), load_rows(config.data.eval, "data.eval")
    assert (len(train), len(test)) == (12, 3)
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    assert all(gsm8k("", row.answer, row.answer, {}) == 1 for row in (*train, *test))


@pytest.mark.parametrize("name", [path.name for path in sorted(EXAMPLE.glob("*.yaml")) if path.name != "config.yaml"])
def test_each_configuration_is_valid_over_the_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files = [word for path in ("config.yaml", name) for word in ("--config", str(EXAMPLE / path))]
    config = load_config(files, {})
    assert config.data.train.path == "openai/gsm8k:main"  # users name the hub's
    assert config.run.name != "gsm8k"  # runs of different configurations have folders of their own


def test_each_key_of_the_table_is_one_of_ours() -> None:
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8").partition("those of its file")[2]
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| ") and "---" not in row][1:]
    config = Config.model_validate({"actor": {"path": "m"}, "data": {"train": {"path": "d"}, "eval": {"path": "d"}}})
    known = dict(flat(config.model_dump(mode="json"))) | {"reward.functions": {}}
    named = [key for row in rows for key in re.findall(r"`([\w.]+)`", row[1])]
    assert [key for key in named if key not in known] == []
    assert {"actor.path", "ref.path", "actor.group_size", "kl_ctl", "total_train_epochs", "optimizer.lr"} <= set(named)

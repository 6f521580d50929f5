"""The examples' committed files: datasets, configurations, reward function."""

import json
from pathlib import Path

import pytest

from examples.demo.addition import lines
from examples.own_reward.brevity import wanted_length
from penstock.config.load import load_config
from penstock_trainer.data.datasets import load_rows

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "examples" / "demo"


def test_the_committed_dataset_is_what_its_program_writes() -> None:
    train, heldout = lines()
    assert (DEMO / "addition_train.jsonl").read_text().splitlines() == train
    assert (DEMO / "addition_heldout.jsonl").read_text().splitlines() == heldout


def test_the_split_holds_every_pair_once_and_right() -> None:
    train, heldout = lines()
    assert (len(train), len(heldout)) == (80, 20)
    seen = set()
    for line in train + heldout:
        row = json.loads(line)
        shots, _, question = row["prompt"].rpartition("\n")
        first, second = map(int, question.removesuffix("=").split("+"))
        assert shots == "2+5=7\n8+4=12"
        assert row["answer"] == str(first + second)
        seen.add((first, second))
    assert seen == {(x, y) for x in range(10) for y in range(10)}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("config.yaml")), ids=lambda path: path.parent.name)
def test_every_example_has_a_valid_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config(["--config", str(path)])
    train = [each.section for each in config.data.training_sets]
    sizes = [len(load_rows(section)) for section in train if section.kind == "jsonl"]
    assert len(sizes) < len(train) or sum(sizes) >= config.data.batch_size
    if config.data.eval is not None and config.data.eval.kind == "jsonl":
        load_rows(config.data.eval)


def test_the_reward_of_ones_own() -> None:
    def score(completion: str) -> float:
        return wanted_length(prompt="", completion=completion, answer="", metadata={"num_words": 4})

    assert [score("a b c d"), score("a b"), score(""), score("a " * 20)] == [1.0, 0.5, 0.0, 0.0]

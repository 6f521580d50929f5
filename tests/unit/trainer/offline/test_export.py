"""`penstock export`: any checkpoint of a run becomes a folder that transformers loads."""

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.contracts import PolicyIdentity
from penstock.contracts.ledger import LedgerState
from penstock_launch.__main__ import run
from penstock_trainer.checkpoints.folders import CheckpointMeta, Checkpoints
from penstock_trainer.learner.learner import Learner
from tests.small_disk import full_disk
from tests.unit.common.records.test_best import line
from tests.unit.trainer.offline.recorded_run import CHECKPOINT_AFTER, RecordedRun, record
from tests.unit.trainer.offline.recorded_run import write_config as write_recorded_config
from tests.unit.trainer.trainer_groups import config_for, example_groups, save_tiny_model


def write_config(folder: Path, dtype: str = "float32", model: str = "model") -> list[str]:
    """Write a configuration file; returns the arguments that name it."""
    document = {
        "run": {"root": str(folder / "runs"), "name": "r"},
        "actor": {"path": str(folder / model), "dtype": "float32"},
        "data": {"train": {"path": "unused.jsonl"}},
        "rollout": {"engine": {"dtype": dtype}},
        "redis": {"url": "redis://127.0.0.1:1/0"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(document))
    return ["export", "--config", str(folder / "config.yaml")]


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, list[dict[str, Tensor]]]:
    """A run with two checkpoints, and the weights of each."""
    (save_tiny_model(tmp_path / "model") / "tokenizer.json").write_text("{}")
    learner = Learner(config_for(tmp_path / "model"))
    checkpoints = Checkpoints(tmp_path / "runs" / "r" / "checkpoints", keep=2)
    weights = []
    for steps in (9, 10):
        learner.update(example_groups(seed=steps), version=0)
        meta = CheckpointMeta(steps, steps, 1, 0, ())
        folder = checkpoints.begin(meta)
        learner.snapshot(folder).write(folder)
        checkpoints.complete(folder, meta)
        weights.append({name: weight.clone() for name, weight in learner.weights().items()})
    return tmp_path, weights


@pytest.mark.parametrize(
    ("words", "index"), [((), 1), (("--checkpoint", "00000009.1"), 0), (("--checkpoint", "best"), 0)]
)
def test_a_checkpoint_becomes_a_folder_that_loads(
    trained: tuple[Path, list[dict[str, Tensor]]], words: tuple[str, ...], index: int
) -> None:
    folder, weights = trained
    checkpoints = folder / "runs" / "r" / "checkpoints"
    shutil.copytree(checkpoints / "00000009.1", checkpoints / "best")  # as a user keeps one
    assert run([*write_config(folder), "--out", str(folder / "out"), *words]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights[index].items())
    assert (folder / "out" / "tokenizer.json").exists()


def test_an_export_without_room_says_so_and_leaves_nothing(
    trained: tuple[Path, list[dict[str, Tensor]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    before = sorted(path.name for path in folder.iterdir())
    words = [*write_config(folder), "--out", str(folder / "out")]
    with full_disk():
        exit_code = run(words)
    assert exit_code == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"penstock: error: model \S*/out cannot be written \(File too large\); expected .*--out\n", error
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted([*before, "config.yaml"])


def test_it_is_rounded_as_it_was_published(trained: tuple[Path, list[dict[str, Tensor]]]) -> None:
    folder, _ = trained
    assert run([*write_config(folder, "bfloat16"), "--out", str(folder / "out")]) == 0
    learner = Learner(config_for(folder / "model", rollout={"engine": {"dtype": "bfloat16"}}))
    learner.load(folder / "runs" / "r" / "checkpoints" / "00000010.1")
    learner.save_pretrained(folder / "final", 12)
    steps = [json.loads((folder / name / "trained.json").read_text())["steps"] for name in ("out", "final")]
    assert steps == [10, 12]
    expected = (folder / "final" / "model.safetensors").read_bytes()
    assert (folder / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("words", "seen"),
    [
        (["--checkpoint", "00000011.1"], "none of run 'r': expected one of 00000009.1, 00000010.1"),
        (["--run.name", "other"], "run 'other' in .* has no checkpoint"),
        (["--out", "{folder}/model"], "model exists already"),
        (["--actor.path", "{folder}/other"], "differ in .* weights and moments, first model.lm_head.weight"),
    ],
)
def test_what_cannot_be_exported_is_said(
    trained: tuple[Path, list[dict[str, Tensor]]], capsys: pytest.CaptureFixture[str], words: list[str], seen: str
) -> None:
    folder, _ = trained
    save_tiny_model(folder / "other", "qwen3")
    command = [*write_config(folder), "--out", str(folder / "out"), *(word.format(folder=folder) for word in words)]
    assert run(command) == 2
    assert re.search(seen, capsys.readouterr().err)
    assert not (folder / "out").exists()


def evaluated(folder: Path, *steps_and_accuracies: tuple[int, float]) -> None:
    lines = [json.dumps(line(steps, accuracy)) + "\n" for steps, accuracy in steps_and_accuracies]
    (folder / "runs" / "r" / "evals.jsonl").write_text("".join(lines))


def test_the_best_checkpoint_is_exported_if_its_weights_are_those_that_were_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By digest: the ledger names that of the weights after each step."""
    (save_tiny_model(tmp_path / "model") / "tokenizer.json").write_text("{}")
    config = write_recorded_config(tmp_path)
    record(tmp_path, config)
    run_folder = RecordedRun(tmp_path)
    out = ("--out", str(tmp_path / "out"))
    assert run_folder.command("export", *out, "--checkpoint", "best") == 2
    assert "has no checkpoint of evaluated weights by the accuracy of main" in capsys.readouterr().err
    evaluated(tmp_path, (0, 1.0), (CHECKPOINT_AFTER, 0.75), (CHECKPOINT_AFTER + 1, 1.0))
    assert run_folder.command("export", *out, "--checkpoint", "best") == 0
    said = capsys.readouterr().out
    words = f"the best (accuracy of main 0.75 after {CHECKPOINT_AFTER} steps), is exported to"
    assert f"checkpoint {CHECKPOINT_AFTER:08d}.1, {words}" in said
    shutil.rmtree(tmp_path / "out")

    def other_digest(ledger: LedgerState) -> None:
        weights = ledger.weights[CHECKPOINT_AFTER]
        policy = PolicyIdentity(weights.policy.number, "f" * 16)
        ledger.weights[CHECKPOINT_AFTER] = msgspec.structs.replace(weights, policy=policy)

    run_folder.change(other_digest)
    assert run_folder.command("export", *out, "--checkpoint", "best") != 0
    assert "expected the weights that were evaluated" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

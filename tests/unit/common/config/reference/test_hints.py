"""Unknown keys of all sources: the message names the key that was meant."""

from pathlib import Path

import pytest
import yaml

from penstock.config.load import load_config
from penstock.config.reference.hints import SHOWN, hint
from penstock.errors import ConfigError

TRL = {"learning_rate": 1e-6, "num_generations": 8, "beta": 0.0}
VERL = {"actor_rollout_ref": {"rollout": {"n": 8, "name": "sglang"}, "actor": {"ppo_mini_batch_size": 64}}}


def refusal(folder: Path, document: object, *words: str, **environ: str) -> str:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(file), *words], environ)
    return str(caught.value)


def test_all_unknown_keys_of_a_file_have_their_key(tmp_path: Path) -> None:
    assert refusal(tmp_path, TRL).splitlines() == [
        f"beta: no such key in --config {tmp_path}/config.yaml; TRL's beta is kl_ctl here",
        f"learning_rate: no such key in --config {tmp_path}/config.yaml; TRL's learning_rate is optimizer.lr here",
        f"num_generations: no such key in --config {tmp_path}/config.yaml; TRL's num_generations is actor.group_size "
        "here",
    ]


def test_a_section_of_another_library_is_answered_by_the_names_in_it(tmp_path: Path) -> None:
    lines = refusal(tmp_path, VERL).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "actor_rollout_ref.actor.ppo_mini_batch_size",
        "actor_rollout_ref.rollout.n",
    ]
    assert lines[0].endswith("is loss.num_minibatches here (counts optimizer steps: data.train_batch_size / "
                             "ppo_mini_batch_size)")  # fmt: skip


def test_a_section_that_nobody_has_is_one_line(tmp_path: Path) -> None:
    assert refusal(tmp_path, {"optimzer": {"lr": 1, "beta1": 2}}).count("\n") == 0


def test_a_key_in_a_section_of_ours(tmp_path: Path) -> None:
    assert "AReaL's actor.optimizer.lr is optimizer.lr here" in refusal(tmp_path, {"actor": {"optimizer": {"lr": 1}}})
    assert "verl's trainer.total_epochs is total_train_epochs" in refusal(tmp_path, {"trainer": {"total_epochs": 1}})


def test_command_line_and_environment(tmp_path: Path) -> None:
    line = refusal(tmp_path, {}, "--num-generations", "8")
    assert line == "num-generations: no such key in the command line; TRL's num_generations is actor.group_size here"
    line = refusal(tmp_path, {}, PENSTOCK_ROLLOUT__N="8")
    assert line.endswith("in the environment; verl's actor_rollout_ref.rollout.n is actor.group_size here")


@pytest.mark.parametrize(
    ("document", "key", "nested"),
    [
        ({"optimizer.lr": 1e-6}, "optimizer.lr", "optimizer: {lr: ...}"),
        ({"data": {"train.path": "d.jsonl"}}, "data.train.path", "data: {train: {path: ...}}"),
        ({"redis.password": "secret"}, "redis.password", "redis: {password: ...}"),
    ],
)
def test_a_key_of_ours_with_dots_is_shown_nested_without_its_value(
    tmp_path: Path, document: object, key: str, nested: str
) -> None:
    assert refusal(tmp_path, document) == (
        f"{key}: no such key in --config {tmp_path}/config.yaml; expected it nested, without dots: {nested}"
    )


def test_a_long_file_is_cut(tmp_path: Path) -> None:
    lines = refusal(tmp_path, {f"zzz{number}": 1 for number in range(3 * SHOWN)}).splitlines()
    assert len(lines) == SHOWN + 1
    assert lines[-1] == f"and {2 * SHOWN} more"


@pytest.mark.parametrize(
    ("key", "end"),
    [
        ("optimizer.beta", "; did you mean optimizer.beta2?"),  # a slip of the pen, not TRL's beta
        ("beta", "; TRL's beta is kl_ctl here"),
        ("optimizer.learning_rate", "; TRL's learning_rate is optimizer.lr here"),
        ("temprature", "; did you mean sampling.temperature or eval.temperature?"),
        ("actor.group_sise", "; did you mean actor.group_size?"),
        ("group_sise", "; did you mean actor.group_size?"),
        ("trainer.max_stalenes", "; did you mean staleness.max_staleness?"),
        ("seed", "; TRL's and AReaL's and OpenRLHF's seed is run.seed here"),
        ("path", "; did you mean actor.path, reward.modules_path, data.train.path or data.eval.path?"),
        ("qqqqqq", "; `penstock keys WORD` finds keys, docs/configuration.md lists all"),
        ("", "; `penstock keys WORD` finds keys, docs/configuration.md lists all"),
        (".", "; `penstock keys WORD` finds keys, docs/configuration.md lists all"),
    ],
)
def test_what_was_meant(key: str, end: str) -> None:
    assert hint(key) == end

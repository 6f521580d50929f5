"""Configuration: layers, and errors that name what was seen and the nearest key."""

from pathlib import Path

import pytest

from penstock.config.load import load_config
from penstock.errors import ConfigError

YAML = """
actor: {path: some/model, group_size: 4}
data: {train: {path: prompts.jsonl}}
optimizer: {lr: 1.0e-5}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(YAML)
    return file


def test_command_line_over_environment_over_yaml_over_default(path: Path) -> None:
    environ = {"PENSTOCK_ACTOR__GROUP_SIZE": "16", "PENSTOCK_OPTIMIZER__LR": "3e-5", "PENSTOCK_KL_CTL": "0.1"}
    config = load_config(["--config", str(path), "--optimizer.lr", "2e-5", "--run.seed=7"], environ)
    assert (config.optimizer.lr, config.actor.group_size, config.kl_ctl) == (2e-5, 16, 0.1)
    assert (config.run.seed, config.actor.path, config.total_train_epochs) == (7, "some/model", 1)


def test_a_document_may_stand_in_for_a_file_that_is_not_given(path: Path) -> None:
    default = {"actor": {"path": "none", "group_size": 5}, "data": {"train": {"path": "none"}}}
    environ = {"PENSTOCK_ACTOR__PATH": "from/environment"}
    config = load_config(["--run.seed", "7"], environ, without_file=default)
    assert (config.actor.path, config.actor.group_size, config.run.seed) == ("from/environment", 5, 7)
    config = load_config(["--config", str(path)], {}, without_file=default)
    assert (config.actor.path, config.actor.group_size) == ("some/model", 4)
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(["--run.seed", "7"], environ)


def test_the_token_comes_from_the_environment_and_is_not_shown(path: Path) -> None:
    config = load_config(["--config", str(path)], {"PENSTOCK_TOKEN": "hush"})
    assert config.token is not None
    assert config.token.get_secret_value() == "hush"
    assert "hush" not in repr(config)


def test_reward_functions_by_dotted_key(path: Path) -> None:
    config = load_config(["--config", str(path), "--reward.functions", "{my.module:score: 0.5, numeric: 1}"], {})
    assert config.reward.functions == {"my.module:score": 0.5, "numeric": 1.0}


@pytest.mark.parametrize(
    ("argv", "environ", "yaml", "words"),
    [
        (["--actor.group_sise", "4"], {}, YAML, ["actor.group_sise", "actor.group_size", "command line"]),
        ([], {"PENSTOCK_ACTOR__PTAH": "x"}, YAML, ["PENSTOCK_ACTOR__PTAH", "actor.path"]),
        ([], {"PENSTOCK_OPTIMISER__LR": "1"}, YAML, ["PENSTOCK_OPTIMISER__LR", "optimizer.lr"]),
        ([], {}, YAML + "optimzer: {lr: 1}", ["optimzer", "optimizer"]),
        ([], {}, YAML + "sampling: {temprature: 1}", ["sampling.temprature", "sampling.temperature"]),
        ([], {}, YAML + "kl_ctl: -1", ["kl_ctl", "-1"]),
        (["--actor.group_size", "many"], {}, YAML, ["actor.group_size", "many"]),
        (["--sampling.temperature", "1e-7"], {}, YAML, ["sampling.temperature", "at least 0.01", "greedy"]),
        (["--sampling.temperature", "0.009"], {}, YAML, ["sampling.temperature", "at least 0.01"]),
        ([], {}, "data: {train: {path: x}}", ["actor", "missing"]),
        ([], {}, "[1, 2]", ["list"]),
        ([], {}, "a: [", ["not YAML"]),
        (["stray"], {}, YAML, ["stray"]),
        (["--kl_ctl"], {}, YAML, ["--kl_ctl"]),
    ],
)
def test_errors_name_the_key(
    tmp_path: Path, argv: list[str], environ: dict[str, str], yaml: str, words: list[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(file), *argv], environ)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--weights.rounding", "dithered"], ["weights.rounding is dithered and actor.dtype bfloat16", "auto"]),
        (["--rollout.engine.dtype", "float32"], ["actor.dtype is bfloat16 and rollout.engine.dtype float32"]),
    ],
)
def test_an_engine_that_would_sample_with_other_weights_is_refused(
    tmp_path: Path, changes: list[str], words: list[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(YAML)
    assert load_config(["--config", str(file)], {}).rounding == "nearest"
    float32 = load_config(["--config", str(file), "--actor.dtype", "float32", *changes], {})
    assert float32.rounding == "dithered"  # the trainer computes with its masters
    adapter = load_config(["--config", str(file), "--actor.lora.rank", "8", *changes], {})
    assert adapter.rounding == "dithered"  # an adapter's updates are computed next to the weights, and show
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(file), *changes], {})
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(["--config", str(tmp_path / "none.yaml")], {})


def test_rules_between_keys(path: Path) -> None:
    with pytest.raises(ConfigError, match="max_running_requests"):
        load_config(["--config", str(path), "--actor.group_size", "128"], {})

"""Models whose config.json names layers that SGLang does not build are refused; others are not."""

import json
from pathlib import Path
from typing import Any

import pytest

from penstock.engine_layers import require_layers
from penstock.errors import ConfigError

MIXTURE = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 8}
LINEAR, FULL = "linear_attention", "full_attention"
HYBRID = {"model_type": "qwen3_5_text", "num_hidden_layers": 4}


@pytest.mark.parametrize(
    "config",
    [
        MIXTURE,
        {**MIXTURE, "mlp_only_layers": [], "decoder_sparse_step": 1},
        {**MIXTURE, "mlp_only_layers": None},
        {**MIXTURE, "mlp_only_layers": [4]},  # there are four, from 0 on
        {"model_type": "k2_horizon", "mlp_only_layers": [0], "decoder_sparse_step": 2},  # SGLang reads them
        {**HYBRID, "full_attention_interval": 2},
        {**HYBRID, "full_attention_interval": 2, "layer_types": [LINEAR, FULL] * 2},
        {"model_type": "qwen3_5", "text_config": {**HYBRID, "full_attention_interval": 4}},
        {"model_type": "llama", "layer_types": [FULL] * 2},
    ],
    ids=str,
)
def test_layers_that_the_engine_builds_are_taken(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    require_layers(str(tmp_path), "actor.path")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**MIXTURE, "mlp_only_layers": [0, 3]}, r"mlp_only_layers \[0, 3\]: expected none.*nonsense: choose another"),
        ({**MIXTURE, "model_type": "qwen2_moe", "decoder_sparse_step": 2}, "decoder_sparse_step 2: expected 1"),
        ({**MIXTURE, "model_type": "qwen3_next", "mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
        (HYBRID, "full_attention_interval None: expected a number.* add full_attention_interval to its config.json$"),
        (
            {**HYBRID, "layer_types": [LINEAR, FULL] * 2},
            r"full_attention_interval None: .*does not load .*to its config\.json \(2 by its layer_types\)$",
        ),
        (
            {**HYBRID, "full_attention_interval": 2, "layer_types": [FULL, LINEAR] * 2},
            r"layer_types \['full_attention', .* beside full_attention_interval 2: expected full attention in each",
        ),
        ({"model_type": "qwen3_5", "text_config": HYBRID}, "full_attention_interval None"),
    ],
    ids=str,
)
def test_other_layers_are_refused_by_the_key_that_names_them(
    config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"^actor\.path is '.*', whose config\.json has " + words):
        require_layers(str(tmp_path), "actor.path")


def test_a_model_without_a_file_that_can_be_read_is_left_to_others(tmp_path: Path) -> None:
    require_layers("owner/name", "actor.path")
    (tmp_path / "config.json").write_text("no JSON")
    require_layers(str(tmp_path), "actor.path")


def test_the_file_of_a_name_on_the_hub_is_given(tmp_path: Path) -> None:
    cached = tmp_path / "config.json"
    cached.write_text(json.dumps({**MIXTURE, "mlp_only_layers": [0]}))
    with pytest.raises(ConfigError, match=r"actor\.path is 'owner/name', whose config\.json has mlp_only_layers"):
        require_layers("owner/name", "actor.path", str(cached))

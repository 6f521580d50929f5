"""The section of the adapter: which values are accepted, and the error of each refused one."""

from pathlib import Path
from typing import Any

import pytest

from penstock.config.load import load_config
from penstock.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "environment", "expected"),
    [
        (["--actor.lora.target_modules", "[q_proj, v_proj]"], {}, ("q_proj", "v_proj")),
        ([], {"PENSTOCK_ACTOR__LORA__TARGET_MODULES": '["q_proj"]'}, ("q_proj",)),
        ([], {"PENSTOCK_ACTOR__LORA__TARGET_MODULES": "all-linear"}, "all-linear"),
        (["--actor.lora.rank", "-1"], {}, "actor.lora.rank: saw -1"),
        (["--actor.lora.alpha", "0"], {}, "actor.lora.alpha: saw 0"),
        (["--actor.lora.target_modules", "q_proj"], {}, "saw 'q_proj'"),
        (["--actor.lora.target_modules", "[]"], {}, "actor.lora.target_modules is empty and actor.lora.rank 8"),
        (["--actor.lora.dropout", "0.1"], {}, "actor.lora.dropout: no such key"),
    ],
)
def test_the_section_is_checked(tmp_path: Path, words: list[str], environment: dict[str, str], expected: Any) -> None:
    (tmp_path / "config.yaml").write_text(
        "actor: {path: some/model, lora: {rank: 8}}\ndata: {train: {path: prompts.jsonl}}\n"
    )
    arguments = ["--config", str(tmp_path / "config.yaml"), *words]
    if isinstance(expected, str) and expected != "all-linear":
        with pytest.raises(ConfigError) as error:
            load_config(arguments, environment)
        assert expected in str(error.value)
    else:
        assert load_config(arguments, environment).actor.lora.target_modules == expected

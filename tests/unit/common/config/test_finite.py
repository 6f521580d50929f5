"""No key of the configuration takes a number that is not finite."""

import math
from typing import Any

import pytest
from pydantic import ValidationError

from penstock.config import Config
from penstock.config.changes import Change, keys_of
from penstock.config.load import build_config
from penstock.errors import ConfigError

HANDED_ON = ("ray.runtime_env", dict)  # any mapping: it is Ray's


def document(key: str, value: object) -> dict[str, Any]:
    """A configuration that is complete but for the value of `key`."""
    tree: dict[str, Any] = {"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}}
    *sections, name = key.split(".")
    inner = tree
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    return tree


def test_no_key_takes_inf_or_nan() -> None:
    """Alone, in a list, in a pair and in a mapping: one of these is the shape of each key that holds numbers."""
    keys = keys_of(*Change)
    assert {"optimizer.lr", "loss.vespo_negative", "reward.functions", "kl_ctl", "data.eval.seed"} <= set(keys)
    taken = []
    for key in keys:
        for number in (math.inf, -math.inf, math.nan):
            for value in (number, [number], [number, 1.0], [1.0, number], {"numeric": number}):
                if (key, type(value)) == HANDED_ON:
                    continue
                try:
                    Config.model_validate(document(key, value))
                except ValidationError as error:
                    places = [".".join(map(str, each["loc"])) for each in error.errors()]
                    assert any(place.startswith(key) for place in places), f"{key}: the error is of {places}"
                else:
                    taken.append((key, value))
    assert taken == []


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "Infinity", "1e999"])
def test_nor_do_the_environment_and_the_command_line(text: str) -> None:
    plain = document("run.name", "x")
    with pytest.raises(ConfigError, match=rf"optimizer\.lr: saw .*{text}.*; input should be a finite number"):
        build_config(plain, [("optimizer.lr", text)], {})
    with pytest.raises(ConfigError, match=rf"kl_ctl: saw .*{text}.*; input should be a finite number"):
        build_config(plain, [], {"PENSTOCK_KL_CTL": text})

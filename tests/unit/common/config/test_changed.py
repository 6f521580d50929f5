"""`changed`: what differs from the defaults is a configuration that means the same, without its secrets."""

from pathlib import Path
from typing import Any

import pytest

from penstock.config.load import build_config, load_config
from penstock.config.shown import as_yaml, changed, hidden_keys

EXAMPLES = Path(__file__).parents[4] / "examples"
DOCUMENT: dict[str, Any] = {"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}}


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*/config.yaml")), ids=lambda file: file.parent.name)
def test_an_example_read_again_is_the_same(tmp_path: Path, file: Path) -> None:
    config = load_config(["--config", str(file)], {})
    (tmp_path / "changed.yaml").write_text(as_yaml(changed(config)))
    assert load_config(["--config", str(tmp_path / "changed.yaml")], {}) == config


def test_only_what_differs_is_there() -> None:
    assert changed(build_config(DOCUMENT, [("optimizer.lr", "1e-6"), ("run.seed", "0")], {})) == DOCUMENT
    with_seed = build_config(DOCUMENT, [("run.seed", "1"), ("data.eval.path", "e.jsonl")], {})
    assert changed(with_seed) == {
        "run": {"seed": 1},
        "actor": {"path": "m"},
        "data": {"train": {"path": "d.jsonl"}, "eval": {"path": "e.jsonl"}},
    }


@pytest.mark.parametrize("functions", ["{exact_match: 1.0}", "{environment: 1.0}"])
def test_functions_are_there_if_the_default_would_be_others(functions: str) -> None:
    pairs = [("agent.environment", "a:B"), ("reward.functions", functions), ("sampling.max_new_tokens", "8")]
    config = build_config(DOCUMENT, pairs, {})
    assert build_config(changed(config), [], {}) == config


def test_secrets_are_left_out_and_named() -> None:
    secrets = {"token": "hush1", "redis.password": "hush2", "redis.url": "redis://me:hush3@host:1/0"}
    argument = ("rollout.engine.extra_args", "[--api-key, hush4, --other, x]")
    config = build_config(DOCUMENT, [*secrets.items(), argument], {})
    assert sorted(hidden_keys(config)) == sorted([*secrets, argument[0]])
    tree = changed(config)
    assert "hush" not in as_yaml(tree)
    assert tree["redis"]["url"] == "redis://me@host:1/0"
    again = build_config(tree, [*secrets.items(), argument], {})
    assert again == config
    assert hidden_keys(build_config(DOCUMENT, [("redis.url", "redis://host:1/0")], {})) == []

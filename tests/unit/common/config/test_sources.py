"""Mappings and texts from each source: a later source replaces a mapping, one entry has a key of its own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.config import Config
from penstock.config.load import build_config, load_config
from penstock.config.shown import as_yaml, without_secrets
from penstock.config.sources import read_yaml
from penstock.errors import ConfigError

DOCUMENT: dict[str, Any] = {"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}}
FUNCTIONS = {"below": '{"numeric": 0.5, "math": 0.25}', "above": '{"exact_match": 1.0}'}
ORDER = ("first file", "second file", "environment", "command line")
PAIRS = [(below, above) for number, above in enumerate(ORDER) for below in ORDER[:number]]


def load(folder: Path, sources: dict[str, dict[str, str]]) -> Config:
    """The configuration from sources, each a mapping of dotted keys to texts."""
    argv: list[str] = []
    for name in ORDER[:2]:
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(DOCUMENT) if name == "first file" else "")
        with file.open("a") as text:
            for dotted, value in sources.get(name, {}).items():
                section, _, key = dotted.rpartition(".")
                text.write(f"{section}: {{{key}: {value}}}\n")
        argv += ["--config", str(file)]
    for dotted, value in sources.get("command line", {}).items():
        argv += [f"--{dotted}", value]
    variables = {
        f"PENSTOCK_{key.upper().replace('.', '__')}": text for key, text in sources.get("environment", {}).items()
    }
    return load_config(argv, variables)


@pytest.mark.parametrize(("below", "above"), PAIRS)
def test_a_later_source_replaces_a_mapping(tmp_path: Path, below: str, above: str) -> None:
    sources = {below: {"reward.functions": FUNCTIONS["below"]}, above: {"reward.functions": FUNCTIONS["above"]}}
    assert load(tmp_path, sources).reward.functions == {"exact_match": 1.0}


@pytest.mark.parametrize(("below", "above"), [pair for pair in PAIRS if pair[1] in ORDER[2:]])
def test_an_entry_by_its_own_key_leaves_the_others(tmp_path: Path, below: str, above: str) -> None:
    sources = {below: {"reward.functions": FUNCTIONS["below"]}, above: {"reward.functions.numeric": "2"}}
    assert load(tmp_path, sources).reward.functions == {"numeric": 2.0, "math": 0.25}
    sources[above] = {"reward.functions.exact_match": "2"}
    assert load(tmp_path, sources).reward.functions == {"numeric": 0.5, "math": 0.25, "exact_match": 2.0}


@pytest.mark.parametrize("source", ORDER[2:])
def test_entries_of_one_source_come_on_top_of_its_mapping(tmp_path: Path, source: str) -> None:
    given = {"reward.functions": "{math: 1}", "reward.functions.numeric": "2"}
    config = load(tmp_path, {"first file": {"reward.functions": "{format_regex: 1}"}, source: given})
    assert config.reward.functions == {"math": 1.0, "numeric": 2.0}


def test_entries_of_environment_and_command_line_add_up(tmp_path: Path) -> None:
    sources = {
        "environment": {"reward.functions.math": "1", "reward.functions.numeric": "1"},
        "command line": {"reward.functions.my.module:score": "3", "reward.functions.numeric": "2"},
    }
    assert load(tmp_path, sources).reward.functions == {"math": 1.0, "numeric": 2.0, "my.module:score": 3.0}


@pytest.mark.parametrize("source", ORDER[2:])
def test_a_default_mapping_holds_only_if_no_source_says_anything(tmp_path: Path, source: str) -> None:
    assert load(tmp_path, {}).reward.functions == {"exact_match": 1.0}
    assert load(tmp_path, {source: {"reward.functions.math": "1"}}).reward.functions == {"math": 1.0}


def test_later_words_of_the_command_line_win(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(DOCUMENT))
    argv = ["--config", str(file), "--reward.functions.math", "1", "--reward.functions", "{numeric: 1}"]
    assert load_config([*argv, "--run.seed=1", "--run.seed=2"], {}).reward.functions == {"numeric": 1.0}
    assert load_config([*argv, "--run.seed=1", "--run.seed=2"], {}).run.seed == 2


def test_every_mapping_of_the_tree_follows_the_rule(tmp_path: Path) -> None:
    document = {"rollout": {"resources": {"a": 1}}, "runtime_env": {"pip": ["x"], "env_vars": {"A": "b", "C": "d"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**DOCUMENT, "ray": document}))
    argv = ["--config", str(tmp_path / "config.yaml")]
    above = ["--ray.rollout.resources", "{TPU: 4}", "--ray.runtime_env.env_vars.A", "e"]
    ray = load_config([*argv, *above], {}).ray
    assert ray.rollout.resources == {"TPU": 4.0}
    assert ray.runtime_env == {"pip": ["x"], "env_vars": {"A": "e", "C": "d"}}
    variables = {"PENSTOCK_RAY__ROLLOUT__RESOURCES": '{"GPU_TYPE": 1}', "PENSTOCK_RAY__RUNTIME_ENV": "{}"}
    ray = load_config(argv, variables).ray
    assert (ray.rollout.resources, ray.runtime_env) == ({"GPU_TYPE": 1.0}, {})


def test_options_of_a_template_have_values_of_any_type(tmp_path: Path) -> None:
    options = {"data.template_options.enable_thinking": "false", "data.template_options.reasoning_effort": "high"}
    wanted = {"enable_thinking": False, "reasoning_effort": "high"}
    for source in ORDER[2:]:
        config = load(tmp_path, {source: options})
        assert config.data.template_options == wanted
        assert without_secrets(config)["data"]["template_options"] == wanted


def test_each_source_sets_keys_of_one_training_set(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("actor: {path: m}\n")
    sets = {
        "data.train_sets": '{"easy": {"path": "e.jsonl"}, "hard": {"path": "h.jsonl"}}',
        "data.train_sets.easy.weight": "2",
        "data.train_sets.hard.weight": "0.5",
        "data.train_sets.hard.columns.answer": "a.b",
    }
    flags = [word for key, value in sets.items() for word in (f"--{key}", value)]
    variables = {f"PENSTOCK_{key.upper().replace('.', '__')}": text for key, text in sets.items()}
    for argv, environ in ((flags, {}), ([], variables)):
        found = load_config(["--config", str(tmp_path / "model.yaml"), *argv], environ).data.train_sets
        assert [(name, each.path, each.weight, each.columns.answer) for name, each in found.items()] == [
            ("easy", "e.jsonl", 2.0, "answer"),
            ("hard", "h.jsonl", 0.5, "a.b"),
        ]


def test_an_unknown_key_of_a_training_set_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text("actor: {path: m}\ndata: {train_sets: {a: {pth: x}, b: {path: y}}}\n")
    with pytest.raises(ConfigError, match=r"data.train_sets.a.pth: no such key .*did you mean data.train_sets.a.path"):
        load_config(["--config", str(tmp_path / "sets.yaml")], {})
    with pytest.raises(ConfigError, match=r"data.train_sets.a.weigth: no such key .*data.train_sets.a.weight"):
        build_config(DOCUMENT, [("data.train_sets.a.weigth", "2")], {})


def test_sections_are_still_joined_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**DOCUMENT, "optimizer": {"lr": 0.5, "eps": 0.25}}))
    (tmp_path / "two.yaml").write_text("optimizer: {lr: 0.125}\ndata: {batch_size: 3}")
    argv = ["--config", str(tmp_path / "one.yaml"), "--config", str(tmp_path / "two.yaml")]
    config = load_config([*argv, "--data", "{train: {size: 7}}"], {"PENSTOCK_OPTIMIZER": '{"beta1": 0.5}'})
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.beta1) == (0.125, 0.25, 0.5)
    assert (config.data.batch_size, config.data.train.size, config.data.train.path) == (3, 7, "d.jsonl")


@pytest.mark.parametrize(
    "text",
    ["# really", "a # b", "one\ntwo\n\nthree", "  ends  ", "yes", "1_000", "08:00:00", "{a: b}", "[x]", "a: b", "'q'",
     "null", "~", "2024-01-01", "\u2028", "\\n", "a\tb", "- x", "-5", "--", "=", "\u00e9\U0001f600"],
)  # fmt: skip
@pytest.mark.parametrize("source", ORDER[2:])
def test_a_text_is_taken_as_it_is(tmp_path: Path, source: str, text: str) -> None:
    assert load(tmp_path, {source: {"data.system_prompt": text}}).data.system_prompt == text
    if all("!" <= character <= "~" for character in text):  # what a token may hold
        token = load(tmp_path, {source: {"token": text}}).token
        assert token is not None
        assert token.get_secret_value() == text


@example("\x85")
@example("a\u2028b\u2029")
@example("\ufeff# a\n  b")
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_a_text_reaches_the_services_through_the_resolved_file(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    config = build_config(DOCUMENT, [("data.system_prompt", text)], {})
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_bytes(as_yaml(without_secrets(config)).encode())
    assert build_config(read_yaml(file), [], {}) == config


def test_a_choice_is_a_text_too(tmp_path: Path) -> None:
    argv = {"data.train.kind": "huggingface", "slurm.time_limit": "8:00:00", "actor.lora.target_modules": "[a, b]"}
    config = load(tmp_path, {"command line": argv})
    assert (config.data.train.kind, config.slurm.time_limit) == ("huggingface", "8:00:00")
    assert config.actor.lora.target_modules == ("a", "b")


def test_json_of_a_variable_may_escape_characters(tmp_path: Path) -> None:
    sources = {"environment": {"sampling.stop": '["\\n", "\\ud83d\\ude00"]'}}
    assert load(tmp_path, sources).sampling.stop == ("\n", "\U0001f600")


def test_an_empty_text_unsets_a_secret_and_an_empty_variable_says_nothing(tmp_path: Path) -> None:
    sources = {"environment": {"token": "hush", "data.system_prompt": ""}, "command line": {"token": ""}}
    config = load(tmp_path, sources)
    assert config.token is None
    assert config.data.system_prompt == ""


BAD: Sequence[tuple[dict[str, dict[str, str]], list[str]]] = [
    ({"environment": {"reward.functions": "{a: "}}, ["reward.functions", "'{a: '", "dictionary"]),
    ({"environment": {"sampling.stop": "x"}}, ["sampling.stop", "'x'"]),
    ({"environment": {"run.seed": "[" * 5000}}, ["run.seed", "integer"]),
    ({"command line": {"run.seed": "9" * 5000}}, ["run.seed", "integer"]),
    ({"command line": {"run.seed": "!!bool x"}}, ["run.seed", "integer"]),
    ({"command line": {"reward.functions": "{math: 1, math: 2}"}}, ["reward.functions", "'math' twice"]),
    ({"command line": {"reward.functions.": "1"}}, ["reward.functions.", "no such key"]),
    ({"command line": {"data.system_prompt": "\udcff"}}, ["data.system_prompt", "UTF-8"]),
    ({"command line": {"sampling.stop": '["\\ud83d"]'}}, ["sampling.stop", "tuple"]),
    ({"environment": {"data.system_prompt": "\udcff"}}, ["DATA__SYSTEM_PROMPT", "UTF-8"]),
    ({"environment": {"ray.rollout.resources.tpu": "1"}}, ["RAY__ROLLOUT__RESOURCES__TPU", "ray.rollout.resources"]),
    ({"command line": {"actor": "5", "actor.path": "x"}}, ["actor.path", "actor holds int"]),
    ({"command line": {"reward.functions": "5", "reward.functions.math": "1"}}, ["reward.functions holds int"]),
    ({"command line": {"run.seed.x": "1"}}, ["run.seed.x", "no such key"]),
    ({"command line": {"data": "{trian: {path: x}}"}}, ["data.trian", "data.train"]),
]


@pytest.mark.parametrize(("sources", "words"), BAD)
def test_a_bad_value_is_one_clear_error(tmp_path: Path, sources: dict[str, dict[str, str]], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, sources)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"actor: {path: \xff}", ["not UTF-8"]),
        (b"actor: {path: a}\nactor: {group_size: 4}", ["'actor' twice", "line 2"]),
        (b"actor: {path: a, path: b}", ["'path' twice"]),
        (b"[" * 5000, ["not YAML"]),
        (b"token: hush: a", ["not YAML: line 1, column 12"]),
        (b"run: {seed: " + b"9" * 5000 + b"}", ["not YAML"]),
        (b"run: {seed: !!bool x}", ["not YAML"]),
        (b'actor: {path: "\\ud83d"}', ["lone surrogate", "line 1"]),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path: Path, text: bytes, words: list[str]) -> None:
    (tmp_path / "config.yaml").write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", str(tmp_path / "config.yaml")], {})
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "hush" not in str(caught.value)


def test_a_file_may_reuse_mappings_by_yaml_merge_and_holds_dates_as_text(tmp_path: Path) -> None:
    text = "actor: &a {path: m, group_size: 4}\nrun: {name: 2024-01-01}\n"
    (tmp_path / "config.yaml").write_text(text + "data: {train: {path: d}, eval: {<<: {path: e, size: 2}, size: 3}}")
    config = load_config(["--config", str(tmp_path / "config.yaml")], {})
    assert config.run.name == "2024-01-01"
    assert config.data.eval is not None
    assert (config.data.eval.path, config.data.eval.size) == ("e", 3)


def test_a_file_that_is_not_there_is_shown_in_full_with_one_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(DOCUMENT))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(["--config", "confg.yaml"], {})
    assert f"looked at {tmp_path}/confg.yaml" in str(caught.value)
    assert str(caught.value).endswith("did you mean 'config.yaml'?")

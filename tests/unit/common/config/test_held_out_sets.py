"""Held-out sets by name: what a set leaves open, what is refused, and how sources name the keys of one set."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.config import Config, EvalSampling
from penstock.config.changes import Change, change_of, differences, settings_of
from penstock.config.identity import differences as differing
from penstock.config.identity import identifying_keys, keys_of
from penstock.config.load import load_config
from penstock.config.shown import as_yaml, changed
from penstock.contracts import ServiceKind
from penstock.errors import ConfigError

HARD = {"path": "hard.jsonl", "functions": {"numeric": 1.0, "format_regex": 0.5}, "temperature": 0.6}
OF_TASK = {"kind": "reasoning_gym", "path": "h", "functions": {"math": 1}}
AGENT = {"environment": "my:Env", "max_tokens": 512}


def loaded(folder: Path, *arguments: str, **sections: Any) -> Config:
    path = folder / "run.yaml"
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}, "eval": {"path": "e"}}}
    path.write_text(yaml.safe_dump(document | sections))
    return load_config(["--config", str(path), *arguments], {})


def test_without_data_eval_there_is_no_set(tmp_path: Path) -> None:
    assert loaded(tmp_path, data={"train": {"path": "d"}}).held_out_sets == ()


def test_a_set_takes_from_the_run_what_it_leaves_open(tmp_path: Path) -> None:
    sampled = {"temperature": 0.9, "samples_per_prompt": 4, "top_k": 20, "max_new_tokens": 64, "success": 0.5}
    own = {**HARD, "samples_per_prompt": 8, "system_prompt": "", "stop": ["."]}
    data = {"train": {"path": "d"}, "eval": {"path": "e"}, "system_prompt": "Think.", "prompt_template": "Q {prompt}"}
    config = loaded(tmp_path, data=data, eval={**sampled, "sets": {"hard": own, "same": {"path": "s", "size": 3}}})
    main, hard, same = config.held_out_sets
    assert [(each.name, each.key, each.dataset.path) for each in config.held_out_sets] == [
        ("main", "data.eval", "e"), ("hard", "eval.sets.hard", "hard.jsonl"), ("same", "eval.sets.same", "s")
    ]  # fmt: skip
    assert main.sampling == same.sampling == EvalSampling.model_validate(sampled)
    assert hard.sampling == EvalSampling.model_validate(
        {**sampled, "temperature": 0.6, "samples_per_prompt": 8, "stop": ["."]}
    )
    assert [each.system_prompt for each in (main, hard, same)] == ["Think.", "", "Think."]
    assert {each.prompt_template for each in (main, hard, same)} == {"Q {prompt}"}
    assert [each.reward for each in (main, hard, same)] == ["", "eval.sets.hard", ""]
    assert same.dataset.size == 3


def test_functions_of_sets_are_loaded_and_weigh_nothing_in_training(tmp_path: Path) -> None:
    config = loaded(tmp_path, eval={"sets": {"hard": HARD}}, reward={"functions": {"format_regex": 2.0}})
    assert config.own_functions == {"eval.sets.hard": {"numeric": 1.0, "format_regex": 0.5}}
    assert config.all_rewards.functions == {"format_regex": 2.0, "numeric": 0.0}
    assert config.reward.functions == {"format_regex": 2.0}
    without = loaded(tmp_path)
    assert without.all_rewards == without.reward


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        ({"main": HARD}, "eval.sets has a set 'main', which is the name of data.eval"),
        ({"a.b": HARD}, "eval.sets.a.b"),
        ({"hard": {"path": "h", "temprature": 1}}, "did you mean eval.sets.hard.temperature?"),
        (
            {"hard": {"path": "h", "samples_per_prompt": 4}},
            "eval.sets.hard.samples_per_prompt is 4 with eval.sets.hard.",
        ),
        ({"hard": {"path": "h", "top_p": 0.9}}, "eval.sets.hard.top_p is 0.9 with eval.sets.hard.temperature 0"),
        ({"hard": {"path": "h", "options": {"a": 1}}}, "expected options only with kind"),
        ({"hard": {"path": "h", "prompt_template": "no"}}, "{prompt} 0 times"),
        ({"hard": {"path": "h", "functions": {"math": 0}}}, "functions holds math, each with weight 0"),
        ({"hard": {"path": "h", "functions": {"environment": 1}}}, "eval.sets.hard.functions has 'environment'"),
        ({"hard": OF_TASK}, "whose rows name their task's own reward: expected no functions"),
    ],
)
def test_a_set_that_cannot_be_right_is_refused(tmp_path: Path, sets: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, eval={"sets": sets})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"data": {"train": {"path": "d"}}, "eval": {"sets": {"hard": HARD}}},
            "eval.sets has hard and data.eval is not",
        ),
        ({"agent": AGENT, "eval": {"max_new_tokens": 512}}, "eval.max_new_tokens is 512 and agent.max_tokens 512"),
        ({"agent": AGENT, "eval": {"stop": ["x"]}}, "eval.stop is set: turns of an episode end as in training"),
    ],
)
def test_evaluation_that_cannot_be_right_is_refused(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, **sections)
    assert words in str(error.value)


def test_the_command_line_sets_one_key_of_one_set(tmp_path: Path) -> None:
    arguments = ("--eval.sets.hard.temperature", "0.3", "--eval.sets.new.path", "n.jsonl")
    config = loaded(tmp_path, *arguments, eval={"sets": {"hard": HARD}})
    hard, new = config.eval.sets["hard"], config.eval.sets["new"]
    assert (hard.temperature, hard.path, hard.functions) == (0.3, "hard.jsonl", HARD["functions"])
    assert (new.path, new.temperature) == ("n.jsonl", None)
    with pytest.raises(ConfigError, match=r"did you mean eval\.sets\.hard\.temperature\?"):
        loaded(tmp_path, "--eval.sets.hard.temprature", "1")


def test_a_variable_sets_all_sets_at_once(tmp_path: Path) -> None:
    """Names have a case, and variables have none."""
    loaded(tmp_path)
    arguments = ["--config", str(tmp_path / "run.yaml")]
    with pytest.raises(ConfigError, match="a variable has no case"):
        load_config(arguments, {"PENSTOCK_EVAL__SETS__HARD__PATH": "h"})
    assert list(load_config(arguments, {"PENSTOCK_EVAL__SETS": '{"AIME24": {"path": "a"}}'}).eval.sets) == ["AIME24"]


def test_what_is_changed_can_be_read_again(tmp_path: Path) -> None:
    config = loaded(tmp_path, eval={"sets": {"hard": {**HARD, "columns": {"answer": "solution"}}}})
    path = tmp_path / "again.yaml"
    path.write_text(as_yaml(changed(config)))
    assert load_config(["--config", str(path)], {}) == config


def test_a_change_of_a_set_holds_at_once_and_is_another_reward_service(tmp_path: Path) -> None:
    """A reward service knows which functions a set has."""
    one, other = loaded(tmp_path), loaded(tmp_path, eval={"sets": {"hard": HARD}})
    assert change_of("eval.sets") is change_of("eval.max_new_tokens") is Change.FREE
    assert [key for key, _, _ in differences(settings_of(one), settings_of(other))] == ["eval.sets"]
    before, after = (keys_of(ServiceKind.REWARD, identifying_keys(each)) for each in (one, other))
    assert [line.split()[0] for line in differing(before, after)] == ["eval.sets"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--eval.patience 2 --eval.every_steps 0", "eval.patience is set and eval.every_steps is 0"),
        ("--checkpoint.keep_best true --eval.every_steps 0", "checkpoint.keep_best is set and eval.every_steps is 0"),
        ("--eval.best_set hard", "eval.best_set is 'hard': expected main"),
        ("--eval.min_delta -1 --eval.patience 1", "eval.min_delta"),
        ("--eval.best_metric loss", "eval.best_metric"),
    ],
)
def test_what_compares_evaluations_needs_them(tmp_path: Path, arguments: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, *arguments.split())
    assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best is set and data\.eval is not: expected held-out"):
        loaded(tmp_path, "--checkpoint.keep_best", "true", data={"train": {"path": "d"}})


def test_any_set_may_say_which_weights_are_the_best(tmp_path: Path) -> None:
    arguments = "--eval.best_set hard --eval.best_metric reward --eval.patience 3 --checkpoint.keep_best true"
    config = loaded(tmp_path, *arguments.split(), eval={"sets": {"hard": HARD}})
    assert (config.eval.best_set, config.eval.patience, config.checkpoint.keep_best) == ("hard", 3, True)
    assert change_of("eval.patience") is Change.FREE
    assert change_of("checkpoint.keep_best") is Change.IRRELEVANT

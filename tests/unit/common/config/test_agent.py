"""The rules of a run with agents between keys, and the memory that its groups can take."""

from typing import Any

import pytest

from penstock.broker import needed_bytes
from penstock.config import Config
from penstock.config.load import build_config
from penstock.errors import ConfigError


def config(**sections: Any) -> Config:
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}, "agent": {"environment": "m:E"}, **sections}
    return build_config(document, [], {})


def test_the_score_of_the_environment_is_the_reward_unless_one_is_named() -> None:
    assert config().reward.functions == {"environment": 1.0}
    assert config(agent={"command": ["agent"]}).reward.functions == {"environment": 1.0}
    assert config(reward={"num_workers": 2}).reward.functions == {"environment": 1.0}
    assert config(reward={"functions": {"math": 1.0}}).reward.functions == {"math": 1.0}
    assert config(agent={}).reward.functions == {"exact_match": 1.0}
    validated = Config.model_validate(config().model_dump())
    assert validated.reward.functions == {"environment": 1.0}


def test_one_entry_of_the_functions_leaves_no_default() -> None:
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}}
    pairs = [("agent.environment", "m:E"), ("reward.functions.math", "0.5")]
    assert build_config(document, pairs, {}).reward.functions == {"math": 0.5}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"agent": {}, "reward": {"functions": {"environment": 1.0}}}, "neither agent.environment nor agent.command"),
        (
            {"agent": {"environment": "m:E", "max_tokens": 512}, "sampling": {"max_new_tokens": 512}},
            "sampling.max_new_tokens is 512 and agent.max_tokens 512",
        ),
        (
            {"agent": {"environment": "m:E", "max_tokens": 4096}, "rollout": {"engine": {"context_length": 2048}}},
            "agent.max_tokens is 4096 and rollout.engine.context_length 2048: expected at most 2042",
        ),
        (
            {"agent": {"environment": "m:E", "max_tokens": 2048}, "rollout": {"engine": {"max_total_tokens": 2048}}},
            "agent.max_tokens is 2048 and rollout.engine.max_total_tokens 2048: expected at most 2042",
        ),
    ],
)
def test_what_cannot_work_is_refused(sections: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        config(**sections)


def test_a_group_of_episodes_may_be_larger_than_an_engine() -> None:
    few = {"engine": {"max_running_requests": 2}}
    assert config(actor={"path": "m", "group_size": 8}, rollout=few).actor.group_size == 8
    with pytest.raises(ConfigError, match=r"expected a server to hold a full group"):
        config(actor={"path": "m", "group_size": 8}, rollout=few, agent={})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": {"truncated": "zero"}}, r"agent.environment is set and loss.truncated zero, .* agent.cut_score"),
        ({"loss": {"overlong": {"buffer_tokens": 4}}}, r"agent.environment is set and loss.overlong.buffer_tokens 4"),
        ({"loss": {"aggregation": "token-sum-norm"}}, r"set loss.norm_length, for example to 4096 \("),
        ({"data": {"train": {"path": "d"}, "template_options": {"a": 1}}}, r"data.template_options holds a"),
        ({"data": {"train": {"path": "d"}, "prompt_template": "{prompt}"}}, r"data.prompt_template is set"),
        ({"loss": {"overlong": {"buffer_tokens": 4}}, "agent": {"command": ["a"]}}, r"agent.command is set and loss"),
    ],
)
def test_what_has_no_meaning_for_episodes_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(**changes)
    without_agent = {name: value for name, value in changes.items() if name != "agent"}
    assert not config(**without_agent | {"agent": {}}).agent.enabled


def test_an_episode_counts_with_its_longest_path() -> None:
    sizes = {
        "actor": {"path": "m", "group_size": 4},
        "data": {"train": {"path": "d"}, "batch_size": 2},
        "sampling": {"max_new_tokens": 10},
    }
    num_trajectories = 2 * 2 * 4
    long = {"environment": "m:E", "max_tokens": 1000}
    assert needed_bytes(config(agent=long, **sizes)) == num_trajectories * 1000 * 13
    assert needed_bytes(config(agent={}, **sizes)) == num_trajectories * 10 * 13


def test_an_episode_that_takes_its_time_is_no_stall() -> None:
    slow = {"environment": "m:E", "timeout_seconds": 900}
    assert config(run={"name": "r", "stall_seconds": 200}, agent=slow).stall_seconds == 1100
    assert config(run={"name": "r", "stall_seconds": 200}, agent={}).stall_seconds == 200

"""What a run of episodes needs of the other sections, and the memory that its groups can take."""

from typing import Any

import pytest
from pydantic import ValidationError

from penstock.broker import needed_bytes
from penstock.config import Config


def config(**changes: Any) -> Config:
    base: dict[str, Any] = {
        "actor": {"path": "m", "group_size": 4},
        "data": {"train": {"path": "d"}, "batch_size": 2},
        "agent": {"environment": "my_envs:Guess", "max_tokens": 1000},
        "sampling": {"max_new_tokens": 10},
    }
    return Config.model_validate(base | changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": {"overlong": {"buffer_tokens": 4}}}, r"agent.environment is set and loss.overlong.buffer_tokens 4"),
        (
            {"loss": {"aggregation": "token-sum-norm"}},
            r"set loss.norm_length, for example to 1000 \(",
        ),
        ({"data": {"train": {"path": "d"}, "template_options": {"a": 1}}}, r"data.template_options holds a"),
        ({"loss": {"overlong": {"buffer_tokens": 4}}, "agent": {"command": ["a"]}}, r"agent.command is set and loss"),
    ],
)
def test_what_has_no_meaning_for_episodes_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        config(**changes)
    without_agent = {name: value for name, value in changes.items() if name != "agent"}
    assert not config(**without_agent | {"agent": {}}).agent.enabled


def test_an_episode_counts_with_its_longest_path() -> None:
    num_trajectories = 2 * 2 * 4
    assert needed_bytes(config()) == num_trajectories * 1000 * 13
    assert needed_bytes(config(agent={})) == num_trajectories * 10 * 13

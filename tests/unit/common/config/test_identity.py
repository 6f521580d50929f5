"""The keys that the processes of a run agree on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from penstock.config import Config
from penstock.config.identity import NOT_IDENTIFYING, READ_BY, differences, digest_of, identifying_keys, keys_of
from penstock.config.keys import known_keys
from penstock.contracts import ServiceKind

SERVICES = Path(__file__).parents[4] / "services"
# Properties: of the tree and of agent.sessions, which decide no result, and of keys that are listed.
COMPUTED = {"max_outstanding", "agent.enabled", "agent.num_connections", "all_rewards"}
COMPUTED |= {"own_functions", "longest_completions"}  # of held-out sets
# How many groups run at once, and whether the engine has room for one; a ticket says what is in a group.
ROOM = ("actor.group_size", "eval.max_share", "sampling.max_new_tokens", "agent.max_tokens", "rollout.engine")
CHECKED = ("reward.functions",)  # whether an environment has the score that they need


def make_config(**changes: Any) -> Config:
    document = {"actor": {"path": "m"}, "data": {"train": {"path": "d"}}} | changes
    return Config.model_validate(document)


def digest(**changes: Any) -> str:
    return digest_of(identifying_keys(make_config(**changes)))


def test_every_key_that_is_listed_exists() -> None:
    assert {*NOT_IDENTIFYING, *(key for keys in READ_BY.values() for key in keys)} <= set(known_keys())


def test_a_ticket_says_how_its_episodes_are_sampled() -> None:
    """So an agent service is none of another run for it."""
    keys = keys_of(ServiceKind.AGENT, identifying_keys(make_config()))
    assert {"actor.path", "agent.environment", "agent.max_turns"} <= keys.keys()
    assert not {key for key in keys if key.startswith(("sampling", "run", "reward", "data"))}


@pytest.mark.parametrize("kind", READ_BY)
def test_a_service_reads_no_other_key_than_those_that_it_is_known_for(kind: ServiceKind) -> None:
    sources = (SERVICES / kind / f"penstock_{kind}").rglob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    known = set(known_keys())
    read = {
        name for name in re.findall(r"\bconfig\.(\w+(?:\.\w+)?)", text) if not {name, name.partition(".")[0]} & COMPUTED
    }
    keys = {name if name in known else name.partition(".")[0] for name in read} & known
    assert {"redis.url", str(kind)} <= keys
    listed = (*NOT_IDENTIFYING, *READ_BY[kind], *ROOM, *CHECKED, "run.name", "staleness")
    assert [key for key in sorted(keys) if not any(key == each or key.startswith(f"{each}.") for each in listed)] == []


def test_a_reward_service_is_known_by_what_scores() -> None:
    keys = keys_of(ServiceKind.REWARD, identifying_keys(make_config()))
    assert sorted(keys) == [
        "eval.sets",
        "reward.functions",
        "reward.gates",
        "reward.max_attempts",
        "reward.max_magnitude",
        "reward.timeout_seconds",
        "staleness.max_deliveries",
        "teacher.urls",
    ]
    rollout = keys_of(ServiceKind.ROLLOUT, identifying_keys(make_config()))
    assert {"actor.path", "rollout.engine.dtype", "weights.pause_mode"} <= rollout.keys()
    assert not {key for key in rollout if key.startswith(("reward", "optimizer", "data"))}


@pytest.mark.parametrize(
    "changes",
    [
        {"run": {"root": "/elsewhere", "existing": "replace", "stall_seconds": 7}},
        {"agent": {"max_failure_share": 1.0}},
        {"redis": {"url": "redis://other:1/0", "password": "s3cret"}, "token": "s3cret"},
        {"rollout": {"host": "10.0.0.2", "advertise_host": "a", "port": 99, "engine": {"port": 1, "device": "cpu"}}},
        {"reward": {"host": "10.0.0.2", "port": 99, "num_workers": 7, "modules_path": "/modules"}},
        {"trainer": {"standby": True, "num_ranks": 4, "device": "cpu", "gpus": [0]}},
        {"rollout": {"gpus": [1, 2], "engine": {"tensor_parallel_size": 2, "gpus_per_server": 2}}},
        {"weights": {"folder": "/dev/shm/w", "local_folder": "/tmp/w"}},
        {"slurm": {"requeue": False}, "log": {"level": "debug"}},
    ],
)
def test_what_belongs_to_one_process_or_host_makes_no_stranger(changes: dict[str, Any]) -> None:
    assert digest(**changes) == digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": {"functions": {"exact_match": 2.0}}},
        {"actor": {"path": "another"}},
        {"sampling": {"temperature": 0.5}},
        {"data": {"train": {"path": "d"}, "eval": {"path": "e"}}},
        {"optimizer": {"lr": 2e-6}},
        {"weights": {"pause_mode": "abort"}},
        {"trainer": {"take_turns": True}},
    ],
)
def test_what_decides_the_results_makes_one(changes: dict[str, Any]) -> None:
    assert digest(**changes) != digest()


def test_the_order_in_which_functions_are_named_does_not_matter() -> None:
    one, other = ({"functions": functions} for functions in ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0}))
    assert digest(reward=one) == digest(reward=other)


def test_no_secret_is_among_them() -> None:
    config = make_config(
        redis={"url": "redis://u:s3cret@db:1/0", "password": "s3cret"},
        token="s3cret",
        rollout={"engine": {"url": "http://u:s3cret@engine", "extra_args": ["--api-key", "s3cret"]}},
    )
    assert "s3cret" not in json.dumps(identifying_keys(config))


def test_each_key_that_differs_is_named_with_both_values() -> None:
    there = identifying_keys(make_config(run={"seed": 1}))
    here = identifying_keys(make_config(run={"seed": 2}, data={"train": {"path": "d"}, "system_prompt": "x" * 99}))
    [prompt, seed] = differences(there, here)
    assert seed == "run.seed is 1 there and 2 here"
    assert prompt.startswith("data.system_prompt is '' there and 'xxx")
    assert len(prompt) < 130
    assert differences({}, {"new.key": 1}) == ["new.key is not set there and 1 here"]

"""Every key has a class, and the settings of a step come back as they were."""

import json

import pytest

from penstock.config import Config
from penstock.config.changes import (
    CLASSES,
    Change,
    change_of,
    differences,
    keys_of,
    settings_of,
    step_settings,
    with_step_settings,
)
from penstock.config.keys import known_keys
from penstock.errors import DataError


def config_with(**sections: object) -> Config:
    return Config.model_validate({"actor": {"path": "m"}, "data": {"train": {"path": "d.jsonl"}}, **sections})


def leaves() -> list[str]:
    sections = {key.rpartition(".")[0] for key in known_keys()}
    return [key for key in known_keys() if key not in sections]


def test_every_key_has_one_class_and_every_name_in_the_table_is_a_key() -> None:
    named = [
        f"{section}.{name}".removeprefix(".")
        for section, classes in CLASSES.items()
        if isinstance(classes, dict)
        for names in classes.values()
        for name in names.split()
    ]
    by_section = {section for section, classes in CLASSES.items() if isinstance(classes, Change)}
    assert len(named) == len(set(named))
    assert sorted(named) == sorted(key for key in leaves() if key.partition(".")[0] not in by_section)
    assert sorted(keys_of(*Change)) == sorted(leaves())


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("actor.path", Change.FIXED),
        ("actor.lora.alpha", Change.FIXED),
        ("optimizer.lr", Change.NEXT_STEP),
        ("total_train_epochs", Change.NEXT_STEP),
        ("sampling.temperature", Change.NEXT_STEP),
        ("reward.functions", Change.FREE),
        ("redis.url", Change.IRRELEVANT),
        ("slurm.trainer.nodes", Change.IRRELEVANT),
    ],
)
def test_the_class_of_a_key(key: str, change: Change) -> None:
    assert change_of(key) is change


def test_an_unknown_key_has_no_class() -> None:
    with pytest.raises(KeyError):
        change_of("optimizer.learning_rate")


def test_settings_come_back_from_json_and_leave_all_other_keys_alone() -> None:
    before = config_with(
        optimizer={"lr": 1e-3, "schedule": "linear"},
        loss={"surrogate": "vespo", "vespo_positive": [1.5, 2.5], "correction": {"gates": ["veto"]}},
        sampling={"temperature": 0.7, "stop": ["x"]},
        total_train_epochs=3,
        kl_ctl=0.1,
    )
    now = config_with(checkpoint={"every_steps": 7}, reward={"functions": {"math": 1.0}})
    restored = with_step_settings(now, json.loads(json.dumps(settings_of(before))))
    assert step_settings(restored) == step_settings(before)
    assert restored.loss == before.loss
    assert (restored.checkpoint, restored.reward, restored.data) == (now.checkpoint, now.reward, now.data)


def test_the_scale_of_rewards_is_that_of_the_step_and_their_functions_are_those_of_now() -> None:
    before = config_with(reward={"clip": [-1, 0.5], "functions": {"math": 1.0}})
    now = config_with(reward={"functions": {"numeric": 2.0}, "gates": {"numeric": 1.0}, "max_magnitude": 7})
    restored = with_step_settings(now, json.loads(json.dumps(settings_of(before))))
    assert restored.reward == now.reward.model_copy(update={"clip": (-1, 0.5)})


def test_a_key_that_was_not_recorded_has_its_default() -> None:
    recorded = settings_of(config_with())
    del recorded["optimizer.ess_base"]
    assert with_step_settings(config_with(optimizer={"ess_base": 0.5}), recorded).optimizer.ess_base == 0


def test_a_recorded_objective_need_not_suit_the_groups_that_are_still_to_come() -> None:
    recorded = settings_of(config_with(loss={"surrogate": "reinforce"}, staleness={"max_staleness": 0}))
    restored = with_step_settings(
        config_with(staleness={"max_staleness": 2}, loss={"dynamic_sampling": True}), recorded
    )
    assert restored.loss.surrogate == "reinforce"


SECTIONS_IN_PARTS = {"", "run", "actor", "reward", "teacher"}


def test_a_section_that_is_checked_again_is_restored_whole() -> None:
    """Else its own rules could refuse a mixture of recorded and present values.

    None of `reward` compares reward.scale or reward.clip with another key: the rules that do are between sections. None
    of `teacher` compares its limits with one.
    """
    for section in {key.rpartition(".")[0] for key in keys_of(Change.NEXT_STEP)} - SECTIONS_IN_PARTS:
        names = {key for key in leaves() if key.rpartition(".")[0] == section}
        assert names <= set(keys_of(Change.NEXT_STEP)), section


def test_a_value_of_another_release_is_named() -> None:
    recorded = settings_of(config_with()) | {"loss.surrogate": "future"}
    with pytest.raises(DataError, match=r"trained with loss\.surrogate 'future'"):
        with_step_settings(config_with(), recorded)


def test_differences_name_each_changed_key_with_both_values_and_no_secret() -> None:
    before = config_with(token="a-secret", redis={"password": "a-secret"})
    now = config_with(optimizer={"lr": 2e-6}, reward={"functions": {"math": 1.0}}, log={"level": "debug"})
    assert list(differences(settings_of(before), settings_of(now))) == [
        ("optimizer.lr", 1e-6, 2e-6),
        ("reward.functions", {"exact_match": 1.0}, {"math": 1.0}),
    ]
    assert "a-secret" not in json.dumps(settings_of(before))

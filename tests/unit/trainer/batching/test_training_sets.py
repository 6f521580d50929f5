"""Figures of a batch by training set."""

from pathlib import Path

from penstock_trainer.batching.training_sets import set_figures
from penstock_trainer.learner.recipe import signal_test
from tests.unit.trainer.trainer_groups import completion, config_for, scored_group

NAMES = {0: "easy", 1: "hard", 2: "easy", 3: "hard"}


def test_each_set_has_its_prompts_rewards_and_share_without_signal(tmp_path: Path) -> None:
    rewards: list[list[float | None]] = [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [None, 0.5]]
    groups = [scored_group(number, [3], [completion([4], [-1.0])] * 2, values) for number, values in enumerate(rewards)]
    found = set_figures(groups, NAMES.__getitem__, signal_test(config_for(tmp_path)))
    assert found == {
        "easy": {"num_prompts": 2, "num_rewards": 4, "reward_mean": 0.75, "no_signal_ratio": 0.5},
        "hard": {"num_prompts": 2, "num_rewards": 3, "reward_mean": 0.5, "no_signal_ratio": 0.5},
    }
    failed = scored_group(1, [3], [completion([4], [-1.0])] * 2, [None, None])
    (only,) = set_figures([failed], NAMES.__getitem__, signal_test(config_for(tmp_path))).values()
    assert only == {"num_prompts": 1, "num_rewards": 0, "no_signal_ratio": 1.0}


def test_a_run_of_one_set_has_none(tmp_path: Path) -> None:
    group = scored_group(0, [3], [completion([4], [-1.0])] * 2, [1.0, 0.0])
    assert set_figures([group], lambda number: "", signal_test(config_for(tmp_path))) == {}

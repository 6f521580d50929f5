"""Surrogates and advantages of users: the same as built-in ones if they are the same, and refused before a step."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.errors import ConfigError
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.recipe import advantage_test, gradient_test, make_recipe
from tests.unit.trainer.trainer_groups import config_for, example_groups, save_tiny_model

SOURCE = """
import torch
from penstock_trainer.grpo import Terms

LIMIT = 1.2


def clipped(tokens, log_ratio_N, mask_N):
    ratio_N, advantage_N = log_ratio_N.exp(), tokens.advantage_N
    loss_N = -torch.minimum(ratio_N * advantage_N, ratio_N.clamp(0.8, LIMIT) * advantage_N)
    low_N = (ratio_N < 0.8) & (advantage_N < 0)
    high_N = (ratio_N > LIMIT) & (advantage_N > 0)
    return Terms(loss_N, low_N & mask_N, high_N & mask_N)


def over_the_mean(rewards_BG, valid_BG):
    mean_B1 = rewards_BG.sum(1, keepdim=True) / valid_BG.sum(1, keepdim=True)
    return rewards_BG - mean_B1


def two(tokens, log_ratio_N):
    return None


def nothing(tokens, log_ratio_N, mask_N):
    return None


def one_number(tokens, log_ratio_N, mask_N):
    return Terms((log_ratio_N * tokens.advantage_N).sum(), mask_N, mask_N)


def floats(tokens, log_ratio_N, mask_N):
    return Terms(log_ratio_N * tokens.advantage_N, mask_N.double(), mask_N)


def flat(tokens, log_ratio_N, mask_N):
    return Terms(log_ratio_N.detach() * tokens.advantage_N, mask_N, mask_N)


def over_the_micro_batch(tokens, log_ratio_N, mask_N):
    none_N = torch.zeros_like(mask_N)
    return Terms((log_ratio_N - log_ratio_N.mean()) * tokens.advantage_N, none_N, none_N)


def fails(tokens, log_ratio_N, mask_N):
    raise RuntimeError("boom")


def of_groups(rewards_BG, valid_BG):
    return rewards_BG.sum(1)


def infinite(rewards_BG, valid_BG):
    return 1 / (rewards_BG - rewards_BG)
"""


@pytest.fixture
def modules_path(tmp_path: Path) -> Iterator[str]:
    """A folder with the module `own_objective`; the import path is put back."""
    folder, path = tmp_path / "own", list(sys.path)
    folder.mkdir()
    (folder / "own_objective.py").write_text(SOURCE)
    yield str(folder)
    sys.path[:] = path
    sys.modules.pop("own_objective", None)


@pytest.mark.parametrize(
    ("own", "built_in"),
    [
        ({"surrogate": "own_objective:clipped"}, {"surrogate": "ppo"}),
        (
            {"advantage": {"function": "own_objective:over_the_mean"}},
            {"advantage": {"baseline": "group", "scale": "none"}},
        ),
    ],
)
def test_a_part_that_is_written_again_trains_the_same_weights(
    tmp_path: Path, modules_path: str, own: dict[str, object], built_in: dict[str, object]
) -> None:
    model = save_tiny_model(tmp_path / "model")
    weights = []
    for loss in ({**own, "modules_path": modules_path}, built_in):
        learner = Learner(config_for(model, loss={**loss, "num_minibatches": 2}, optimizer={"lr": 1e-2}))
        result = learner.update(example_groups(), version=0)
        weights.append((dict(learner.weights()), result.statistics.clipped_ratio))
    (mine, my_clipped), (theirs, their_clipped) = weights
    assert my_clipped == their_clipped
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


def test_a_function_may_give_any_group_an_advantage(modules_path: str) -> None:
    advantage = {"function": "own_objective:over_the_mean"}
    config = config_for(Path("unused"), loss={"advantage": advantage, "modules_path": modules_path})
    (group,) = example_groups(num_groups=1)
    assert (gradient_test(config)(group), advantage_test(config)(group)) == (True, True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent:clipped", "No module named 'absent'"),
        ("own_objective:cliped", "did you mean 'own_objective:clipped'?"),
        ("own_objective:LIMIT", "it is a float"),
        ("own_objective:two", "TypeError"),
        ("own_objective:nothing", "it returned a NoneType"),
        ("own_objective:one_number", "its loss_N is a tensor float64[]; expected a tensor float[5] with a gradient"),
        ("own_objective:floats", "its low_N is a tensor float64[5]; expected bool[5]"),
        ("own_objective:flat", "expected a tensor float[5] with a gradient"),
        ("own_objective:over_the_micro_batch", "would depend on its micro-batches"),
        ("own_objective:fails", "RuntimeError: boom"),
    ],
)
def test_a_surrogate_that_cannot_be_right_is_refused_at_start(modules_path: str, name: str, words: str) -> None:
    loss = {"surrogate": name, "modules_path": modules_path}
    with pytest.raises(ConfigError) as error:
        make_recipe(config_for(Path("unused"), loss=loss))
    assert words in str(error.value)
    assert str(error.value).startswith(f"loss.surrogate is '{name}'")
    assert "expected a function (tokens, log_ratio_N, mask_N)" in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_objective:of_groups", "it returned a tensor float64[2]; expected a tensor float[2, 3]"),
        ("own_objective:infinite", "expected finite numbers"),
    ],
)
def test_advantages_that_cannot_be_right_are_refused_at_start(modules_path: str, name: str, words: str) -> None:
    loss = {"advantage": {"function": name}, "modules_path": modules_path}
    with pytest.raises(ConfigError, match=r"^loss\.advantage\.function is ") as error:
        make_recipe(config_for(Path("unused"), loss=loss))
    assert words in str(error.value)

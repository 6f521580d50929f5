"""The reference follows the policy: when, by how much, and not at all where nothing needs it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from penstock.errors import ConfigError
from penstock_trainer.checkpoints.tensors import read_shapes
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.moving_reference import REFERENCE
from penstock_trainer.model.loading import load_model
from penstock_trainer.model.pack_model import PackModel
from penstock_trainer.model.token_model import TokenModel
from tests.unit.trainer.trainer_groups import completion, config_for, example_groups, save_tiny_model, scored_group

LR = {"lr": 1e-2}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def moving(folder: Path, sync_steps: int = 2, mixup_alpha: float = 1.0, **changes: Any) -> Learner:
    ref = {"sync_steps": sync_steps, "mixup_alpha": mixup_alpha}
    return Learner(config_for(folder, **({"kl_ctl": 0.5, "ref": ref, "optimizer": LR} | changes)))


Arrays = dict[str, npt.NDArray[np.float64]]


def arrays(model: TokenModel | None) -> Arrays:
    """Copies of all weights, by name."""
    assert isinstance(model, PackModel)
    return {name: weight.double().numpy() for name, weight in model.model.state_dict().items()}


def policy_and_reference(learner: Learner) -> tuple[Arrays, Arrays]:
    return arrays(learner._policy), arrays(learner._reference)


def are_equal(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def holds_a_reference(state: Iterable[str]) -> bool:
    return any(name.startswith(REFERENCE) for name in state)


def copied(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("alpha", [1.0, 0.6, 0.1])
def test_it_is_the_mixture_that_numpy_makes_of_each_second_version(model_folder: Path, alpha: float) -> None:
    learner = moving(model_folder, 2, alpha)
    expected = policy_and_reference(learner)[0]  # both begin as one model
    for version in range(5):
        assert learner.update(example_groups(seed=version), version=version).changed
        if version in (1, 3):
            policy = policy_and_reference(learner)[0]
            expected = {name: (1 - alpha) * weight + alpha * policy[name] for name, weight in expected.items()}
        for name, weight in policy_and_reference(learner)[1].items():
            np.testing.assert_allclose(weight, expected[name], rtol=0, atol=0 if alpha == 1 else 1e-6)
    assert not are_equal(*policy_and_reference(learner))


def test_the_divergence_begins_at_0_after_each_move(model_folder: Path) -> None:
    learner = moving(model_folder)
    seen = [learner.update(example_groups(seed=7), version=version).statistics.reference_kl for version in range(5)]
    assert [abs(value) < 1e-6 for value in seen] == [True, False, True, False, True]
    assert min(seen[1], seen[3]) > 1e-4


def test_a_step_that_changes_nothing_moves_nothing(model_folder: Path) -> None:
    learner = moving(model_folder, 1)
    nothing = [scored_group(0, [4], [completion([7], [-3.0]), completion([8], [-3.0])], [None, None])]
    learner.update(example_groups(), version=0)
    learner.update(example_groups(seed=1), version=1)
    before = copied(learner)
    assert not learner.update(nothing, version=2).changed
    assert same(before, copied(learner))


def test_mini_batches_move_it_once(model_folder: Path) -> None:
    """It follows versions of the weights, not optimizer steps: all mini-batches of a step have one reference."""
    learner = moving(model_folder, 1, loss={"num_minibatches": 4})
    learner.update(example_groups(), version=0)
    assert are_equal(*policy_and_reference(learner))


def test_a_checkpoint_holds_it_and_a_learner_goes_on_bit_identically(model_folder: Path, tmp_path: Path) -> None:
    learner = moving(model_folder, 2, 0.5)
    for version in range(3):
        learner.update(example_groups(seed=version), version=version)
    learner.snapshot(tmp_path).write(tmp_path)
    saved = copied(learner)
    assert holds_a_reference(saved)
    for restored in (moving(model_folder, 2, 0.5), learner):  # one that has trained nothing, one that went on
        if restored is learner:
            learner.update(example_groups(seed=9), version=3)
        restored.load(tmp_path)
        assert same(saved, copied(restored))
    again = moving(model_folder, 2, 0.5)
    again.load(tmp_path)
    for each in (learner, again):
        each.update(example_groups(seed=3), version=3)
        each.update(example_groups(seed=4), version=4)
    assert same(copied(learner), copied(again))


def test_one_that_begins_to_move_begins_at_ref_path(model_folder: Path, tmp_path: Path) -> None:
    standing = Learner(config_for(model_folder, kl_ctl=0.5, optimizer=LR))
    standing.update(example_groups(), version=0)
    standing.snapshot(tmp_path).write(tmp_path)
    later = moving(model_folder, 5)
    begun = policy_and_reference(later)[1]
    later.load(tmp_path)
    standing.use(later.config, num_steps=0)
    for each in (standing, later):
        policy, reference = policy_and_reference(each)
        assert are_equal(reference, begun)
        assert not are_equal(policy, begun)
    moved = moving(model_folder, 1)
    moved.update(example_groups(), version=0)
    with pytest.raises(RuntimeError, match="holds no reference"):
        moved.load(tmp_path)


@pytest.mark.parametrize("num_trained", [1, 2])
def test_a_checkpoint_is_read_by_the_settings_of_the_step_that_comes_next(
    model_folder: Path, tmp_path: Path, num_trained: int
) -> None:
    """Whatever the configuration says now: it stands still, or begins elsewhere. Before and after the first move."""
    elsewhere = save_tiny_model(tmp_path / "elsewhere")
    _halve(elsewhere)
    learner = moving(model_folder)
    for version in range(num_trained):
        learner.update(example_groups(seed=version), version=version)
    folder = tmp_path / "saved"
    folder.mkdir()
    learner.snapshot(folder).write(folder)
    assert holds_a_reference(read_shapes(folder)) == (num_trained > 1)
    standing = Learner(config_for(model_folder, kl_ctl=0.5, optimizer=LR))
    other = moving(model_folder, ref={"path": str(elsewhere), "sync_steps": 3})
    for each in (standing, other):
        each.load(folder)
        each.use(learner.config, num_steps=0)
        assert are_equal(policy_and_reference(each)[1], policy_and_reference(learner)[1])


def _halve(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(folder)


def test_other_settings_leave_it_where_it_is(model_folder: Path, tmp_path: Path) -> None:
    learner = moving(model_folder, 2)
    for version in range(3):
        learner.update(example_groups(seed=version), version=version)
    learner.snapshot(tmp_path).write(tmp_path)
    ref = {"sync_steps": 3, "mixup_alpha": 0.25}
    other = config_for(model_folder, kl_ctl=0.1, ref=ref, optimizer={"lr": 2e-2})
    begun_anew = Learner(other)
    begun_anew.load(tmp_path)
    learner.use(other, num_steps=0)
    assert same(copied(learner), copied(begun_anew))
    for each in (learner, begun_anew):
        each.update(example_groups(seed=3), version=3)
    assert same(copied(learner), copied(begun_anew))


def test_a_reference_of_another_shape_is_refused(model_folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", "qwen3")
    words = r"ref\.sync_steps is 2, .*'.*other' and actor\.path differ in \d+ weights, first "
    with pytest.raises(ConfigError, match=words):
        moving(model_folder, ref={"path": str(other), "sync_steps": 2})


@pytest.mark.parametrize("loss", [{}, {"sampler_kl": 0.1}, {"kl": {"place": "reward", "estimator": "k1"}}])
def test_without_a_kl_term_no_reference_is_loaded(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, Any]
) -> None:
    """Nor is its folder looked at. What is held is what is held without the key, to the byte."""
    loaded: list[str] = []

    def counted(path: str, key: str) -> Any:
        loaded.append(key)
        return load_model(path, key)

    monkeypatch.setattr("penstock_trainer.learner.learner.load_model", counted)
    absent = str(tmp_path / "absent")
    learner = Learner(config_for(model_folder, kl_ctl=0.0, ref={"path": absent}, loss=loss))
    assert loaded == ["actor.path"]
    plain = Learner(config_for(model_folder, loss=loss))
    assert [each.nbytes for each in learner._tensors()] == [each.nbytes for each in plain._tensors()]
    learner.update(example_groups(), version=0)
    assert loaded == ["actor.path"] * 2
    with pytest.raises(ConfigError, match=r"ref\.path"):
        Learner(config_for(model_folder, kl_ctl=0.1, ref={"path": absent}, loss=loss))

"""The tensors of training leave the device and come back: all of them, bit for bit."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock_trainer.checkpoints.tensors import read_all
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.residence import Residence, tensors_of
from penstock_trainer.model.pack_model import PackModel
from tests.unit.trainer.trainer_groups import config_for, example_groups, save_tiny_model

TOKENS = (4, 9, 5, 7, 11)
NUM_STEPS = 3
ALIGNED_BYTES = 64  # as torch aligns memory of the CPU


class Card:
    """Memory that stands in for a GPU's: what lies in it is on the device. What is freed becomes nan."""

    def __init__(self, num_bytes: int = 2**22) -> None:
        self._memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self._used_bytes = 0
        self.num_frees = 0
        self.pinned: set[int] = set()

    def allocate(self, like: Tensor) -> Tensor:
        start = self._used_bytes
        self._used_bytes += -(-like.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES
        return self._memory[start : start + like.nbytes].view(like.dtype).view(like.shape)

    def pin(self, like: Tensor) -> Tensor:
        home = torch.empty_like(like)
        self.pinned.add(home.data_ptr())
        return home

    def free(self) -> None:
        self._memory.fill_(255)
        self._used_bytes = 0
        self.num_frees += 1

    def holds(self, tensor: Tensor) -> bool:
        return 0 <= tensor.data_ptr() - self._memory.data_ptr() < self._memory.nbytes

    def left(self) -> list[Tensor]:
        """All tensors of this process that still lie in it.

        Those that an earlier test has left may have no memory of their own: torch's wrappers under vmap, for example.
        """
        alive = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
        return [each for each in alive if each is not self._memory and has_memory(each) and self.holds(each)]


def has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def test_a_tensor_without_memory_of_its_own_is_not_on_the_card() -> None:
    card = Card()
    wrapped: list[Tensor] = []

    def keep(each: Tensor) -> Tensor:
        wrapped.append(each)
        return each

    torch.vmap(keep)(torch.zeros(2))
    assert (type(wrapped[0]), has_memory(wrapped[0]), card.left()) == (Tensor, False, [])
    on_card = card.allocate(torch.zeros(4))
    assert {each.data_ptr() for each in card.left()} == {on_card.data_ptr()}


def sharing(config: Any, card: Card) -> Learner:
    """A learner whose device is the card."""
    learner = Learner(config, starts_on_host=True)
    learner._residence = Residence(
        card.allocate, card.pin, lambda: None, card.free, lambda tensor: tensor.data_ptr() in card.pinned
    )
    return learner


def living(learner: Learner) -> Iterator[Tensor]:
    """What a step reads and writes, found without the code under test."""
    for name, tensor in learner.state().items():
        if name not in ("num_steps", "rng") and not name.startswith("lora."):
            yield tensor
    models = [learner._policy.model]
    models += [each.model for each in (learner._reference, learner._teacher) if isinstance(each, PackModel)]
    for model in models:
        yield from model.parameters()
        yield from model.buffers()


def state(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "minibatches": {"loss": {"num_minibatches": 2}},
    "reference": {"kl_ctl": 0.1},
    "moving reference": {"kl_ctl": 0.1, "ref": {"sync_steps": 2, "mixup_alpha": 0.5}},
    "teacher": {"teacher": {"reward_weight": 0.5}},
    "adapter": {"kl_ctl": 0.1, "lora": {"rank": 4, "target_modules": ("q_proj", "down_proj")}},
}


@pytest.mark.parametrize("case", CASES)
def test_training_in_turns_gives_the_bits_of_a_training_that_stays(tmp_path: Path, case: str) -> None:
    changes = dict(CASES[case])
    folder = save_tiny_model(tmp_path / "model", "qwen3")
    actor = {"path": str(folder), "dtype": "float32"}
    if "lora" in changes:
        actor["lora"] = changes.pop("lora")
    if "teacher" in changes:
        changes["teacher"] = changes["teacher"] | {"path": str(save_tiny_model(tmp_path / "teacher"))}
    config = config_for(folder, actor=actor, **changes)
    card = Card()
    staying, moving = Learner(config), sharing(config, card)
    for step in range(NUM_STEPS):
        assert not any(card.holds(each) for each in living(moving))
        moving.to_device()
        assert all(card.holds(each) for each in living(moving) if each.numel())
        groups = example_groups(seed=step)
        expected = staying.update(groups, version=step)
        assert replace(moving.update(groups, version=step), seconds={}) == replace(expected, seconds={})
        assert moving.sequence_logprobs(TOKENS) == staying.sequence_logprobs(TOKENS)
        moving.to_host()
        assert card.left() == []
        assert same(state(moving), state(staying))
        assert moving.fingerprint() == staying.fingerprint()
    assert card.num_frees == NUM_STEPS


def test_a_checkpoint_is_written_from_host_memory_and_read_there(tmp_path: Path) -> None:
    config = config_for(save_tiny_model(tmp_path / "model"))
    card = Card()
    learner = sharing(config, card)
    learner.to_device()
    learner.update(example_groups(), version=0)
    learner.to_host()
    (tmp_path / "saved").mkdir()
    learner.snapshot(tmp_path / "saved").write(tmp_path / "saved")
    stored = read_all(tmp_path / "saved")
    assert all(torch.equal(stored[name], tensor) for name, tensor in learner.state().items())
    again = sharing(config, Card())
    again.load(tmp_path / "saved")
    for each in (learner, again):
        each.to_device()
        assert each.update(example_groups(seed=1), version=1).changed
    assert same(state(learner), state(again))


def test_other_settings_in_the_middle_of_a_turn_stay_on_the_device(tmp_path: Path) -> None:
    config = config_for(save_tiny_model(tmp_path / "model"))
    other = config_for(tmp_path / "model", optimizer={"lr": 1e-2})
    card = Card()
    staying, moving = Learner(config), sharing(config, card)
    moving.to_device()
    for learner in (staying, moving):
        learner.update(example_groups(), version=0)
        learner.use(other, num_steps=0)
    assert all(card.holds(each) for each in living(moving))
    for learner in (staying, moving):
        learner.update(example_groups(seed=1), version=1)
    moving.to_host()
    assert same(state(moving), state(staying))


def test_moves_are_idempotent_and_a_learner_that_stays_makes_none(tmp_path: Path) -> None:
    config = config_for(save_tiny_model(tmp_path / "model"))
    card = Card()
    learner = sharing(config, card)
    learner.to_host()
    assert (card.num_frees, learner.has_gpu_turn) == (0, False)
    learner.to_device()
    learner.to_device()
    assert learner.has_gpu_turn
    learner.to_host()
    learner.to_host()
    assert (card.num_frees, learner.has_gpu_turn) == (1, False)
    staying = Learner(config)
    places = [each.data_ptr() for each in living(staying)]
    staying.to_device()
    staying.to_host()
    assert [each.data_ptr() for each in living(staying)] == places
    assert not staying.has_gpu_turn


def test_each_way_home_is_to_the_same_memory(tmp_path: Path) -> None:
    """Pinned memory takes long to make. That in which the models were loaded is not pinned."""
    card = Card()
    learner = sharing(config_for(save_tiny_model(tmp_path / "model")), card)
    places = []
    for _ in range(2):
        learner.to_device()
        learner.to_host()
        places.append([each.data_ptr() for each in living(learner)])
    assert set(places[0]) <= card.pinned
    assert places[0] == places[1]


def test_on_a_cpu_a_move_is_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host with a GPU too, of which it takes no memory."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("the GPU was used"))
    weight, moment = nn.Parameter(torch.randn(3, 4)), torch.randn(3, 4)
    tied = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    tied["a"].weight = tied["b"].weight = weight
    tensors = list(tensors_of([tied, tied], [moment, moment]))
    assert len(tensors) == 4  # the weight once, two biases, the moment
    residence = Residence.of(torch.device("cpu"))
    before, places = [each.clone() for each in tensors], [each.data_ptr() for each in tensors]
    residence.to_device(tensors)
    moved = [each.data_ptr() for each in tensors]
    assert not set(places) & set(moved)
    assert tied["a"].weight is weight
    residence.to_host(tensors)
    assert [each.data_ptr() for each in tensors] == places
    assert all(map(torch.equal, tensors, before))

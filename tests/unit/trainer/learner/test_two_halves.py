"""An update in two halves: the first changes nothing, and while it computes, other threads may read the weights."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock_trainer.learner.learner import Learner
from penstock_trainer.weights.files import Format, digests
from tests.patience import ANSWER_SECONDS
from tests.unit.trainer.trainer_groups import config_for, example_groups, save_tiny_model

TOKENS = (4, 9, 5, 7, 11)
AS_IT_IS = Format("float32", "nearest")
NUM_STEPS = 4
IN_BFLOAT16 = {"rollout": {"engine": {"dtype": "bfloat16"}}}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def state(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.state().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_first_half_of_an_update_changes_nothing(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder, loss={"num_minibatches": 2}))
    before = state(learner)
    pending = learner.begin(example_groups(), version=0)
    assert same(state(learner), before)
    assert pending.finish().changed
    assert not same(state(learner), before)


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_two_halves_are_one_update(model_folder: Path, num_minibatches: int) -> None:
    config = config_for(model_folder, loss={"num_minibatches": num_minibatches})
    halves, at_once = Learner(config), Learner(config)
    for seed in range(2):
        first = halves.begin(example_groups(seed=seed), version=seed).finish()
        second = at_once.update(example_groups(seed=seed), version=seed)
        assert replace(first, seconds={}) == replace(second, seconds={})
        assert set(first.seconds) == {"pack", "forward_backward", "optimizer"}
    assert same(state(halves), state(at_once))


def test_an_update_that_is_never_finished_leaves_no_trace_in_the_next(model_folder: Path) -> None:
    learner, undisturbed = (Learner(config_for(model_folder)) for _ in range(2))
    before = state(learner)
    learner.begin(example_groups(), version=0)
    assert same(state(learner), before)
    for each in (learner, undisturbed):
        assert each.update(example_groups(seed=1), version=0).changed
    assert same(state(learner), state(undisturbed))


def test_an_update_is_finished_once_and_before_the_next_one_begins(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder))
    abandoned = learner.begin(example_groups(), version=0)
    pending = learner.begin(example_groups(seed=1), version=0)
    with pytest.raises(RuntimeError, match="before the next one begins"):
        abandoned.finish()
    pending.finish()
    with pytest.raises(RuntimeError, match="finished once"):
        pending.finish()


class Reader:
    """Reads weights and scores a sequence in a thread, over and over, until it is stopped."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._ended, self._began = threading.Event(), threading.Event()
        self.digests: list[dict[str, str]] = []
        self.scores: list[tuple[float, ...]] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._began.wait(ANSWER_SECONDS)

    def _read(self) -> None:
        while not (self._ended.is_set() and self.scores):
            self._began.set()
            self.digests.append(digests(self._learner.weights(), AS_IT_IS))
            self.scores.append(self._learner.sequence_logprobs(TOKENS))

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"actor": {"dtype": "bfloat16", "gradient_checkpointing": True}, "kl_ctl": 0.1} | IN_BFLOAT16,
        {"actor": {"dtype": "bfloat16", "lora": {"rank": 2}}, "kl_ctl": 0.1} | IN_BFLOAT16,
    ],
    ids=["float32", "bfloat16 with checkpointing", "an adapter that is off for the reference"],
)
def test_reading_and_scoring_beside_updates_moves_no_bit_of_either(
    model_folder: Path, changes: dict[str, dict[str, object]]
) -> None:
    actor = {"path": str(model_folder), "dtype": "float32", "max_tokens_per_micro_batch": 16}
    config = config_for(model_folder, **changes | {"actor": actor | changes.get("actor", {})})
    learner, alone = Learner(config), Learner(config)
    assert learner.reads_beside_gradient
    for step in range(NUM_STEPS):
        expected = digests(alone.weights(), AS_IT_IS), alone.sequence_logprobs(TOKENS)
        reader = Reader(learner)
        pending = learner.begin(example_groups(num_groups=8, seed=step), version=0)
        reader.end()
        pending.finish()
        alone.update(example_groups(num_groups=8, seed=step), version=0)
        assert len(reader.scores) > 1
        assert all(each == expected[0] for each in reader.digests)
        assert set(reader.scores) == {expected[1]}
    assert same(state(learner), state(alone))

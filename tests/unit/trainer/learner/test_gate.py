"""An update asks before its first change of weights; until then others may read them, and no bit of either moves."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.errors import FencedError, PenstockError
from penstock_trainer.gate import Gate
from penstock_trainer.learner.learner import Learner
from penstock_trainer.weights.files import Format, digests
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


def in_thread(call: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except PenstockError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_a_gate_lets_through_once_it_is_open_and_measures_the_wait() -> None:
    gate = Gate()
    thread, errors = in_thread(gate.wait)
    thread.join(0.05)
    assert thread.is_alive()
    gate.open()
    thread.join(10)
    assert (thread.is_alive(), errors) == (False, [])
    assert 0.05 <= gate.waited_seconds < 10
    gate.shut()
    gate.wait()


def test_a_gate_that_is_shut_ends_the_wait_with_an_error() -> None:
    gate = Gate()
    thread, errors = in_thread(gate.wait)
    gate.shut()
    thread.join(10)
    assert not thread.is_alive()
    assert [str(error)[:27] for error in errors] == ["the step was not committed:"]


def test_an_update_asks_once_before_its_first_change(model_folder: Path) -> None:
    learner = Learner(config_for(model_folder, loss={"num_minibatches": 2}))
    before, seen = state(learner), []
    result = learner.update(example_groups(), version=0, before_change=lambda: seen.append(state(learner)))
    assert result.changed
    assert len(seen) == 1
    assert same(seen[0], before)
    assert not same(state(learner), before)


def test_the_wait_is_in_no_phase_of_the_update(model_folder: Path) -> None:
    gate, waited = Gate(), threading.Event()

    def wait() -> None:
        waited.wait(0.3)
        gate.open()
        gate.wait()

    result = Learner(config_for(model_folder)).update(example_groups(), version=0, before_change=wait)
    assert sum(result.seconds.values()) < 0.3


def test_a_refused_update_changes_nothing_and_the_next_is_as_if_it_had_not_been(model_folder: Path) -> None:
    learner, undisturbed = (Learner(config_for(model_folder)) for _ in range(2))
    before = state(learner)

    def refuse() -> None:
        raise FencedError("the lease is held by another")

    with pytest.raises(FencedError, match="held by another"):
        learner.update(example_groups(), version=0, before_change=refuse)
    assert same(state(learner), before)
    for each in (learner, undisturbed):
        assert each.update(example_groups(seed=1), version=0).changed
    assert same(state(learner), state(undisturbed))


class Reader:
    """Reads weights and scores a sequence in a thread, again and again, until the update asks."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._asked, self._began = threading.Event(), threading.Event()
        self.digests: list[dict[str, str]] = []
        self.scores: list[tuple[float, ...]] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._began.wait(10)

    def _read(self) -> None:
        while not (self._asked.is_set() and self.scores):
            self._began.set()
            self.digests.append(digests(self._learner.weights(), AS_IT_IS))
            self.scores.append(self._learner.sequence_logprobs(TOKENS))

    def end(self) -> None:
        self._asked.set()
        self._thread.join(10)


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
    assert learner.stages_beside_update
    for step in range(NUM_STEPS):
        expected = digests(alone.weights(), AS_IT_IS), alone.sequence_logprobs(TOKENS)
        reader = Reader(learner)
        learner.update(example_groups(num_groups=8, seed=step), version=0, before_change=reader.end)
        alone.update(example_groups(num_groups=8, seed=step), version=0)
        assert len(reader.scores) > 1
        assert all(each == expected[0] for each in reader.digests)
        assert set(reader.scores) == {expected[1]}
    assert same(state(learner), state(alone))

"""The canary of a version has the log-probabilities of its weights, whatever the sampling temperature."""

import math
from pathlib import Path

import pytest
import torch

from penstock.config import Config
from penstock.contracts import PolicyIdentity
from penstock.contracts.services import Announcement
from penstock.errors import NonFiniteError, WeightsBusyError
from penstock_trainer.learner.learner import Learner
from penstock_trainer.weight_sync.canary import CanaryMaker
from tests.unit.trainer.trainer_groups import config_for, example_groups, save_tiny_model

TOKENS = (4, 9, 5, 7, 11)


def alone(learner: Learner) -> list[float]:
    """The model's log-probabilities without packing or temperature."""
    with torch.no_grad():
        logits = learner._policy.model(torch.tensor([TOKENS])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0].tolist()


def test_it_follows_the_weights_at_temperature_1_and_changes_none(tmp_path: Path) -> None:
    config = config_for(save_tiny_model(tmp_path / "model"), sampling={"temperature": 0.5})
    learner, undisturbed = Learner(config), Learner(config)
    said = []
    for step in range(3):
        said.append(learner.sequence_logprobs(TOKENS))
        assert said[-1] == pytest.approx(alone(learner), abs=1e-5)
        results = [each.update(example_groups(seed=step), version=0) for each in (learner, undisturbed)]
        assert results[0].loss == results[1].loss
    assert len(set(said)) == 3


def config(engine: str = "bfloat16", **weights: object) -> Config:
    return config_for(Path("unused"), rollout={"engine": {"dtype": engine}}, weights=weights)


def test_a_short_prompt_is_repeated_and_a_long_one_cut() -> None:
    asked: list[tuple[int, ...]] = []

    def logprobs(token_ids: object) -> tuple[float, ...]:
        assert isinstance(token_ids, tuple)
        asked.append(token_ids)
        return (-1.0,) * (len(token_ids) - 1)

    for prompt in ((7, 8, 9), tuple(range(50))):
        CanaryMaker(logprobs, prompt, config(canary_tokens=4)).make(1)
    assert asked == [(7, 8, 9, 7), (0, 1, 2, 3)]
    assert CanaryMaker(logprobs, (7, 8), config(canary_tokens=0)).make(1) is None


def test_one_token_is_no_canary() -> None:
    with pytest.raises(ValueError, match="at least 2: the first token has no log-probability"):
        config(canary_tokens=1)


@pytest.mark.parametrize(
    ("engine", "weights", "tolerance"),
    [("float32", {}, 0.002), ("bfloat16", {}, 0.25), ("bfloat16", {"canary_tolerance": 0.1}, 0.1)],
)
def test_the_tolerance_is_that_of_the_types(engine: str, weights: dict[str, object], tolerance: float) -> None:
    canary = CanaryMaker(lambda ids: (-1.0,) * (len(ids) - 1), (7, 8), config(engine, **weights)).make(1)
    assert canary is not None
    assert canary.tolerance == tolerance


@pytest.mark.parametrize("canary_tokens", [16, 0])
def test_weights_that_give_no_finite_answer_are_not_published(canary_tokens: int) -> None:
    """Also if no canary goes with them."""
    maker = CanaryMaker(lambda ids: (math.nan,) * (len(ids) - 1), (7, 8), config(canary_tokens=canary_tokens))
    with pytest.raises(NonFiniteError, match=r"version 3 .* nan, nan, nan, nan .*expected finite ones.*optimizer\.lr"):
        maker.make(3)


def test_files_that_are_asked_for_come_with_the_canary_of_their_version() -> None:
    maker = CanaryMaker(lambda ids: (-1.0,) * (len(ids) - 1), (7, 8), config())
    files = Announcement(PolicyIdentity(3, "d"), "/weights/3", 1)
    maker.make(2)
    with pytest.raises(WeightsBusyError, match="version 3 is staged and has no canary yet"):
        maker.beside(files)
    canary = maker.make(3)
    assert maker.beside(files) == Announcement(files.identity, files.path, files.lease, canary)

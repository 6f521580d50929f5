"""The log-ratios of an update are what the model says; to record them changes nothing that is trained."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from penstock.contracts import Completion, Node, ScoredGroup, unpack_float32, unpack_int32
from penstock.contracts.log_ratios import unpack_log_ratios
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.log_ratios import LARGEST, NO_LOG_RATIOS, RankLogRatios
from penstock_trainer.learner.update import StepResult
from tests.tolerance import logprob_tolerance
from tests.unit.trainer.episode_groups import (
    NEWEST,
    branching_group,
    context,
    episode,
    episode_group,
    random_episode_groups,
    sampled,
)
from tests.unit.trainer.trainer_groups import (
    completion,
    config_for,
    example_groups,
    save_tiny_model,
    scored_group,
    tiny_model,
)

FLOAT16_STEP = 2.0**-11  # half of the distance of two neighbours, relative
LONGEST = 64  # tokens of a sequence here, and more
Values = dict[tuple[int, int, int], float]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def expected(groups: Sequence[ScoredGroup], version: int, max_lag: int | None = None) -> Values:
    """Of each trained token, by group, trajectory and place among the sampled tokens; a forward pass for each turn."""
    model = tiny_model()
    found: Values = {}
    for b, group in enumerate(groups):
        rewards = [score.value for score in group.scores]
        if len({value for value in rewards if value is not None}) < 2:
            continue
        mean = sum(value for value in rewards if value is not None) / sum(value is not None for value in rewards)
        for g, value in enumerate(rewards):
            if value is None or value == mean:
                continue
            place = 0
            for before, turn, is_trained in turns(group, g):
                ids = unpack_int32(turn.token_ids)
                with torch.no_grad():
                    logits_TV = model(input_ids=torch.tensor([before + ids])).logits[0].float()
                own_TV = torch.log_softmax(logits_TV[len(before) - 1 : -1], -1)
                versions = [span.policy.number for span in turn.spans for _ in range(span.start, span.end)]
                mask = getattr(turn, "loss_mask", None) or bytes([1]) * len(ids)
                for t, behaviour in enumerate(unpack_float32(turn.logprobs or b"")):
                    is_young = max_lag is None or version - versions[t] <= max_lag
                    if is_trained and mask[t] and is_young:
                        found[b, g, place + t] = float(own_TV[t, ids[t]]) - behaviour
                place += len(ids)
    return found


def turns(group: ScoredGroup, g: int) -> Iterator[tuple[list[int], Completion | Node, bool]]:
    """The tokens before each sampled turn, the turn, and whether it is trained."""
    trajectory = group.group.trajectories[g]
    if isinstance(trajectory, Completion):
        yield unpack_int32(group.group.ticket.prompt_ids), trajectory, True
        return
    for number, node in enumerate(trajectory.nodes):
        if node.is_sampled:
            above = trajectory.path(number)[:-1]
            yield [each for at in above for each in unpack_int32(trajectory.nodes[at].token_ids)], node, node.is_trained


def recorded(
    result: StepResult, groups: Sequence[ScoredGroup], version: int, max_lag: int | None = None
) -> tuple[Values, int]:
    """The values that are a number, and how many places there are."""
    by_trajectory = result.log_ratios.by_trajectory(groups, version=version, max_lag=max_lag)
    assert [len(row) for row in by_trajectory] == [len(group.scores) for group in groups]
    found: Values = {}
    for b, row in enumerate(by_trajectory):
        for g, data in enumerate(row):
            values = unpack_log_ratios(data)
            assert len(values) in (0, groups[b].group.trajectories[g].num_tokens)
            found |= {(b, g, place): value for place, value in enumerate(values) if value == value}
    return found, sum(len(data) for row in by_trajectory for data in row)


def same(found: Values, wanted: Values) -> bool:
    return found == pytest.approx(wanted, rel=FLOAT16_STEP, abs=logprob_tolerance(tiny_model(), LONGEST))


@pytest.mark.parametrize("max_tokens", [4096, 16])
def test_each_trained_token_has_the_models_log_probability_minus_the_samplers(
    model_folder: Path, max_tokens: int
) -> None:
    groups = example_groups(num_groups=3)
    groups[1] = scored_group(1, [3, 4], [completion([5], [-1.0]), completion([6], [-2.0])], [1.0, 1.0])
    actor = {"path": str(model_folder), "dtype": "float32", "max_tokens_per_micro_batch": max_tokens}
    found, _ = recorded(Learner(config_for(model_folder, actor=actor)).update(groups, version=0), groups, 0)
    wanted = expected(groups, 0)
    assert {b for b, _, _ in wanted} == {0, 2}
    assert same(found, wanted)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random_episode_groups())
def test_an_episodes_values_are_at_the_tokens_of_their_turns(model_folder: Path, groups: list[ScoredGroup]) -> None:
    for max_lag in (None, 2):
        learner = Learner(config_for(model_folder))
        result = learner.update(groups, version=NEWEST, max_lag=max_lag)
        assert same(recorded(result, groups, NEWEST, max_lag)[0], expected(groups, NEWEST, max_lag))


def test_tokens_that_are_context_or_auxiliary_have_a_place_and_no_value(model_folder: Path) -> None:
    tree = episode([context(-1, [3, 4]), sampled(0, [5, 6]), sampled(0, [7], auxiliary=True), sampled(1, [8])])
    groups = [episode_group(0, [tree, tree], [1.0, 0.0])]
    found, num_bytes = recorded(Learner(config_for(model_folder)).update(groups, version=0), groups, 0)
    assert sorted(found) == [(0, g, place) for g in (0, 1) for place in (0, 1, 3)]
    assert num_bytes == 2 * 2 * 4


def test_a_batch_without_a_gradient_has_none(model_folder: Path) -> None:
    flat = scored_group(0, [3, 4], [completion([5], [-1.0]), completion([6], [-2.0])], [1.0, 1.0])
    assert recorded(Learner(config_for(model_folder)).update([flat], version=0), [flat], 0) == ({}, 0)
    assert NO_LOG_RATIOS.by_trajectory([flat], version=0, max_lag=None) == ((b"", b""),)


def test_later_mini_batches_have_the_old_log_probabilities_only_if_these_are_recomputed(model_folder: Path) -> None:
    groups, wanted = example_groups(), expected(example_groups(), 0)

    def by(**loss: object) -> Values:
        config = config_for(model_folder, loss=loss, optimizer={"lr": 1e-1})
        return recorded(Learner(config).update(groups, version=0), groups, 0)[0]

    assert same(by(num_minibatches=2, proximal="recomputed", correction={"weight": "tis"}), wanted)
    changed = by(num_minibatches=2)
    assert changed.keys() == wanted.keys()
    differing = {b for b, g, t in wanted if abs(changed[b, g, t] - wanted[b, g, t]) > 0.1}
    assert differing == {2, 3}


def test_the_weights_are_bit_for_bit_those_of_an_update_that_records_nothing(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prints = []
    for is_recorded in (True, False):
        if not is_recorded:
            monkeypatch.setattr(RankLogRatios, "add", lambda *_: None)
        learner = Learner(config_for(model_folder, loss={"num_minibatches": 2}))
        results = [learner.update([*example_groups(seed=step), branching_group(9)], version=0) for step in range(3)]
        assert any(results[0].log_ratios.parts[0].values) == is_recorded
        prints.append((learner.fingerprint(), [result.loss for result in results]))
    assert prints[0] == prints[1]


def test_what_float16_cannot_hold_is_its_largest_number(model_folder: Path) -> None:
    answers = [completion([5], [-1e6]), completion([6], [1e6])]
    groups = [scored_group(0, [3, 4], answers, [1.0, 0.0])]
    found, _ = recorded(Learner(config_for(model_folder)).update(groups, version=0), groups, 0)
    assert found == {(0, 0, 0): LARGEST, (0, 1, 0): -LARGEST}

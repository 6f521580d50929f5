"""Training on episodes: the trie gives the loss and the gradient of one row per turn; replays give the same bits."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from penstock.contracts import Episode, ScoredGroup, unpack_float32, unpack_int32
from penstock_trainer.batching.batch import make_batch
from penstock_trainer.batching.packing import Pack, make_packs
from penstock_trainer.checkpoints.step_files import StepFiles
from penstock_trainer.grpo import Tokens, micro_batch_loss
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.recipe import advantage_test, gradient_test, make_recipe
from penstock_trainer.model.pack_model import PackModel
from tests.unit.trainer.episode_groups import (
    NEWEST,
    branching_group,
    context,
    episode,
    episode_group,
    random_episode_groups,
    sampled,
)
from tests.unit.trainer.trainer_groups import config_for, save_tiny_model, tiny_model

EPS_CLIP = 0.2  # the default of loss.eps_clip


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def turns_of(found: Episode) -> Iterator[tuple[list[int], list[int], list[float]]]:
    """The tokens before each trained turn, its tokens, and their log-probabilities."""
    for number, node in enumerate(found.nodes):
        if node.is_trained:
            before = [each for at in found.path(number)[:-1] for each in unpack_int32(found.nodes[at].token_ids)]
            yield before, unpack_int32(node.token_ids), unpack_float32(node.logprobs or b"")


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in model.named_parameters()}


def one_row_per_turn(groups: Sequence[ScoredGroup]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of PPO's clipped ratio, one forward and backward pass for each turn."""
    model, total = tiny_model(), 0.0
    num_groups = len([group for group in groups if sum(score.value is not None for score in group.scores) >= 2])
    for group in groups:
        values = [score.value for score in group.scores if score.value is not None]
        if len(values) < 2:
            continue
        rewards = torch.tensor(values, dtype=torch.float64)
        for found, score in zip(group.group.episodes, group.scores, strict=True):
            if score.value is None or len(set(values)) == 1:
                continue
            advantage = float((score.value - rewards.mean()) / (rewards.std() + 1e-6))
            for before, ids, behaviour in turns_of(found):
                logits_TV = model(input_ids=torch.tensor([before + ids])).logits[0].float()
                logprobs_T = torch.log_softmax(logits_TV[len(before) - 1 : -1], -1)
                own_T = logprobs_T.gather(1, torch.tensor(ids)[:, None])[:, 0]
                ratio_T = (own_T - torch.tensor(behaviour)).exp()
                clipped_T = ratio_T.clamp(1 - EPS_CLIP, 1 + EPS_CLIP)
                loss = -torch.minimum(ratio_T * advantage, clipped_T * advantage).sum() / (num_groups * len(values))
                loss.backward()
                total += loss.item()
    return total, gradients(model)


def packed(groups: Sequence[ScoredGroup], folder: Path, max_tokens: int) -> tuple[float, dict[str, Tensor]]:
    recipe = make_recipe(config_for(folder))
    model, total = tiny_model(), 0.0
    policy = PackModel(model, dtype=torch.float32, temperature=1.0)
    for pack in make_packs(make_batch(groups, recipe.rules, version=NEWEST).samples, max_tokens):
        loss, _ = micro_batch_loss(loss_tokens(policy, pack), recipe.objective)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def loss_tokens(policy: PackModel, pack: Pack) -> Tokens:
    logprobs_U, _ = policy.token_logprobs(pack)
    return Tokens(
        logprobs_N=logprobs_U.index_select(0, pack.target_N),
        behaviour_logprobs_N=pack.behaviour_logprobs_N,
        advantage_N=pack.advantage_N,
        weight_N=pack.weight_N,
        sequence_N=pack.sequence_N,
        num_sequences=pack.num_sequences,
    )


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random_episode_groups())
def test_the_trie_gives_loss_and_gradient_of_one_row_per_turn(model_folder: Path, groups: list[ScoredGroup]) -> None:
    expected, expected_gradients = one_row_per_turn(groups)
    for max_tokens in (4096, 8):
        loss, found = packed(groups, model_folder, max_tokens)
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
        for name, gradient in expected_gradients.items():
            scale = max(1.0, float(gradient.abs().max()))
            assert float((found[name] - gradient).abs().max()) <= 1e-5 * scale, name


def test_micro_batches_that_cut_episodes_give_the_same_step(model_folder: Path) -> None:
    results = []
    for max_tokens in (4096, 16):
        actor = {"path": str(model_folder), "dtype": "float32", "max_tokens_per_micro_batch": max_tokens}
        results.append(Learner(config_for(model_folder, actor=actor)).update([branching_group()], version=0))
    assert (results[0].num_packs, results[1].num_packs > 1) == (1, True)
    for name, value in asdict(results[0].statistics).items():
        if value is not None:  # teacher_kl, without a teacher
            assert asdict(results[1].statistics)[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)


@pytest.mark.parametrize("max_tokens", [4096, 16])
def test_a_kl_term_in_the_reward_adds_up_over_the_paths_of_an_episode(model_folder: Path, max_tokens: int) -> None:
    """Equal rewards: half the difference of both sums is the advantage of either."""
    group, model = branching_group(rewards=(1.0, 1.0)), tiny_model()
    sums = []
    for found in group.group.episodes:
        total = 0.0
        for before, ids, behaviour in turns_of(found):
            with torch.no_grad():
                logits_TV = model(input_ids=torch.tensor([before + ids])).logits[0].float()
            own_T = torch.log_softmax(logits_TV[len(before) - 1 : -1], -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            total += float((torch.tensor(behaviour) - own_T).sum())
        sums.append(total)
    config = config_for(
        model_folder,
        actor={"path": str(model_folder), "dtype": "float32", "max_tokens_per_micro_batch": max_tokens},
        kl_ctl=0.5,
        loss={"kl": {"place": "reward", "estimator": "k1"}, "advantage": {"scale": "none"}},
    )
    counts = Learner(config).update([group], version=0).counts
    assert counts.advantage_max == pytest.approx(0.5 * abs(sums[0] - sums[1]) / 2, rel=1e-4)


def test_an_episode_is_trained_from_its_step_file_with_the_same_bits(model_folder: Path, tmp_path: Path) -> None:
    groups = [branching_group(0), branching_group(1, rewards=(None, None))]
    files = StepFiles(tmp_path / "steps", 0)
    read = files.read(files.write(0, 1, groups))
    assert list(read) == groups
    prints = []
    for each in (groups, read):
        learner = Learner(config_for(model_folder))
        assert learner.update(each, version=0).changed
        prints.append(learner.fingerprint())
    assert prints[0] == prints[1]


def test_which_groups_of_episodes_have_a_gradient(model_folder: Path) -> None:
    config = config_for(model_folder)
    tests = (gradient_test(config), advantage_test(config))
    assert [test(branching_group()) for test in tests] == [True, True]
    assert [test(branching_group(rewards=(1.0, 1.0))) for test in tests] == [False, False]
    silent = episode([context(-1, [3]), sampled(0, [4], auxiliary=True)])
    assert [test(episode_group(0, [silent, silent], [1.0, 0.0])) for test in tests] == [False, True]

"""From configuration to update: mini-batches, gates of a batch, KL in the reward, entropy, schedules, staleness."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from penstock.config import OptimizerSection
from penstock.contracts import Completion, PolicyIdentity, ScoredGroup, VersionSpan
from penstock_trainer.batching.batch import BatchRules, Overlong, make_batch
from penstock_trainer.grpo import Baseline
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.optimizer import schedule_factor
from penstock_trainer.learner.recipe import advantage_test, gradient_test
from penstock_trainer.model.pack_model import PackModel
from tests.unit.trainer.trainer_groups import completion, config_for, example_groups, save_tiny_model, scored_group

DECOUPLED = {"proximal": "recomputed", "correction": {"weight": "tis", "high": 5.0}, "eps_clip": 1e-3}

M2PO = {"gates": ["m2po"], "m2po_tau": 1e9}


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def weights_after(learner: Learner, *batches: list[ScoredGroup]) -> dict[str, Tensor]:
    for groups in batches:
        learner.update(groups, version=0)
    return {name: weight.clone() for name, weight in learner.weights().items()}


def test_mini_batches_are_optimizer_steps_on_shares_of_the_groups(model_folder: Path) -> None:
    groups = example_groups(num_groups=5)
    split = Learner(config_for(model_folder, loss={"num_minibatches": 2}))
    one_by_one = Learner(config_for(model_folder))
    expected = weights_after(one_by_one, groups[:2], groups[2:])
    for name, weight in weights_after(split, groups).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_minibatches", [1, 2, 3])
def test_the_parts_of_the_loss_add_up_to_it(model_folder: Path, tmp_path: Path, num_minibatches: int) -> None:
    other = save_tiny_model(tmp_path / "other")
    _perturb(other)
    loss = {"entropy_bonus": 0.3, "sampler_kl": 0.5, "num_minibatches": num_minibatches}
    result = Learner(config_for(model_folder, kl_ctl=0.5, ref={"path": str(other)}, loss=loss)).update(
        example_groups(num_groups=5), version=0
    )
    statistics = result.statistics
    parts = [statistics.loss_policy, statistics.loss_kl, statistics.loss_sampler_kl, statistics.loss_entropy]
    assert result.loss == pytest.approx(sum(parts), rel=1e-5)
    assert all(abs(part) > 0.01 for part in parts)


@pytest.mark.parametrize(("num_minibatches", "clips"), [(1, False), (2, True)])
def test_a_recomputed_proximal_policy_is_that_of_the_start_of_the_update(
    model_folder: Path, num_minibatches: int, clips: bool
) -> None:
    group = example_groups(num_groups=1)[0]
    loss = {**DECOUPLED, "num_minibatches": num_minibatches}
    learner = Learner(config_for(model_folder, loss=loss, optimizer={"lr": 1e-2}))
    result = learner.update([group, group], version=0)
    assert (result.statistics.clipped_ratio > 0) == clips


@pytest.mark.parametrize(
    "loss",
    [
        {"correction": {"gates": ["m2po"], "m2po_tau": 0.1}},
        DECOUPLED,
        {"surrogate": "gspo"},
        {"surrogate": "reinforce", "correction": {"weight": "sequence_tis", "normalized": True}},
        {"selection": {"entropy_share": 0.3}},
        {"selection": {"covariance": "clip", "covariance_share": 0.2, "covariance_low": 0.01}},
        {"selection": {"covariance": "kl", "covariance_share": 0.2}, **DECOUPLED},
        {"advantage": {"baseline": "none", "scale": "none", "whitening": "tokens"}},
    ],
)
def test_micro_batches_give_the_same_step_where_completions_or_batches_count(
    model_folder: Path, loss: dict[str, Any]
) -> None:
    results, weights = [], []
    for max_tokens in (4096, 16):
        actor = {"path": str(model_folder), "dtype": "float32", "max_tokens_per_micro_batch": max_tokens}
        learner = Learner(config_for(model_folder, actor=actor, loss=loss))
        results.append(learner.update(example_groups(), version=0))
        weights.append(dict(learner.weights()))
    assert results[0].num_packs < results[1].num_packs
    assert results[0].statistics.masked == pytest.approx(results[1].statistics.masked)
    assert results[0].loss == pytest.approx(results[1].loss, abs=1e-5)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-4)
    for gate in results[0].statistics.masked.keys() & {"m2po", "entropy", "clip_cov"}:
        assert 0 < results[0].statistics.masked[gate] < 1


@pytest.mark.parametrize(
    "loss", [{"correction": M2PO}, {"selection": {"entropy_share": 0.3, "covariance": "kl"}}], ids=["gate", "selection"]
)
def test_a_batch_without_a_gradient_has_no_figures_of_its_tokens(model_folder: Path, loss: dict[str, Any]) -> None:
    group = scored_group(0, [4, 5], [completion([7, 8], [-3.0, -3.0]), completion([9], [-4.0])], [1.0, 1.0])
    assert not Learner(config_for(model_folder, loss=loss)).update([group], version=0).changed


@pytest.mark.parametrize(
    ("loss", "num_passes"), [({"proximal": "none"}, 3), (DECOUPLED, 5), ({**DECOUPLED, "correction": M2PO}, 8)]
)
def test_no_log_probability_is_computed_twice_with_the_same_weights_but_for_its_gradient(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, loss: dict[str, Any], num_passes: int
) -> None:
    """Three mini-batches: a pass each with a gradient; one each but the first before the update; one each for M2PO."""
    passes: list[bool] = []
    computed = PackModel.token_logprobs

    def counted(self: PackModel, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        passes.append(torch.is_grad_enabled())
        return computed(self, *arguments, **keywords)

    monkeypatch.setattr(PackModel, "token_logprobs", counted)
    Learner(config_for(model_folder, loss={**loss, "num_minibatches": 3})).update(
        example_groups(num_groups=3), version=0
    )
    assert (len(passes), sum(passes)) == (num_passes, 3)


def sampled_now(model_folder: Path) -> ScoredGroup:
    """Two completions as the model samples them: their log-probabilities are its own."""
    scorer = Learner(config_for(model_folder))
    answers = [completion(ids, scorer.sequence_logprobs((4, 5, *ids))[1:]) for ids in ([7, 8], [9, 6])]
    return scored_group(0, [4, 5], answers, [1.0, 0.0])


@pytest.mark.parametrize("proximal", ["none", "recomputed", "approximated"])
@pytest.mark.parametrize(("gate", "share"), [("opsm", 0.25), ("m2po", 0.5)])
def test_gates_see_what_the_first_mini_batch_did_to_the_second(
    model_folder: Path, proximal: str, gate: str, share: float
) -> None:
    """Both mini-batches are the same on-policy group. Once it has moved, OPSM drops its bad half, M2PO all of it."""
    group = sampled_now(model_folder)
    correction = {"weight": "none", "gates": [gate], "opsm_delta": 0.02, "m2po_tau": 1e-4}
    for num_minibatches, expected in ((1, 0.0), (2, share)):
        loss = {"proximal": proximal, "correction": correction, "num_minibatches": num_minibatches}
        learner = Learner(config_for(model_folder, loss=loss, optimizer={"lr": 1e-2}))
        assert learner.update([group, group], version=0).statistics.masked[gate] == expected


@pytest.mark.parametrize("num_minibatches", [1, 2])
@pytest.mark.parametrize("loss", [{"surrogate": "reinforce"}, {"proximal": "recomputed"}, {"proximal": "approximated"}])
def test_a_gate_that_drops_nothing_changes_nothing(
    model_folder: Path, loss: dict[str, Any], num_minibatches: int
) -> None:
    weights = []
    for gates in ([], ["m2po"]):
        correction = {"weight": "tis", "gates": gates, "m2po_tau": 1e9}
        changed = {**loss, "correction": correction, "num_minibatches": num_minibatches}
        learner = Learner(config_for(model_folder, loss=changed, optimizer={"lr": 1e-2}))
        weights.append(weights_after(learner, example_groups()))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_kl_term_in_the_reward_makes_advantages_of_equal_rewards(model_folder: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other")
    _perturb(other)
    answers = [completion([7, 8], [-3.0, -3.0]), completion([9], [-4.0])]
    groups = [scored_group(0, [4, 5], answers, [1.0, 1.0])]
    kl = {"place": "reward", "estimator": "k1"}
    with_kl = Learner(config_for(model_folder, kl_ctl=0.1, ref={"path": str(other)}, loss={"kl": kl}))
    result = with_kl.update(groups, version=0)
    assert result.changed
    assert result.counts.advantage_std > 0
    assert _advantages(model_folder, other, groups[0]) == pytest.approx(_expected_penalties(other), rel=1e-5)
    assert result.counts.reward_std == 0.0  # as scored
    assert result.statistics.loss_kl == 0.0
    assert not Learner(config_for(model_folder)).update(groups, version=0).changed


def _advantages(model_folder: Path, reference: Path, group: ScoredGroup) -> list[float]:
    """The largest and the smallest of the group, with neither a baseline nor a scale."""
    loss = {"kl": {"place": "reward", "estimator": "k1"}, "advantage": {"baseline": "none", "scale": "none"}}
    learner = Learner(config_for(model_folder, kl_ctl=0.1, ref={"path": str(reference)}, loss=loss))
    counts = learner.update([group], version=0).counts
    return [counts.advantage_max, counts.advantage_min]


def _expected_penalties(reference: Path) -> list[float]:
    """1 - kl_ctl * sum of l_b - l_r for the completions [7, 8] and [9] of the test above, the largest first."""
    scorer = Learner(config_for(reference))
    sums = [sum(scorer.sequence_logprobs((4, 5, *ids))[1:]) for ids in ((7, 8), (9,))]
    return sorted(
        (1 - 0.1 * (behaviour - own) for behaviour, own in zip((-6.0, -4.0), sums, strict=True)), reverse=True
    )


def _perturb(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    model.save_pretrained(folder)


def test_an_entropy_bonus_raises_the_entropy(model_folder: Path) -> None:
    group = scored_group(0, [4, 5], [completion([7, 8], [-3.0, -3.0]), completion([9], [-4.0])], [1.0, 1.0])
    learner = Learner(config_for(model_folder, loss={"entropy_bonus": 1.0}))
    entropies = [learner.update([group], version=0).statistics.entropy for _ in range(5)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 0.01


def test_tokens_know_how_many_versions_they_lag() -> None:
    spans = (VersionSpan(PolicyIdentity(3, "a" * 16), 0, 1), VersionSpan(PolicyIdentity(5, "b" * 16), 1, 3))
    old = completion([7, 8, 9], [-1.0, -1.0, -1.0])
    mixed = Completion(old.token_ids, old.loss_mask, old.logprobs, spans, "", "stop")
    batch = make_batch([scored_group(0, [4], [mixed, old], [1.0, 0.0])], BatchRules(Overlong(8)), version=5)
    assert [sample.lags.tolist() for sample in batch.samples] == [[2, 0, 0], [5, 5, 5]]


def test_overlong_completions_count_as_varying_rewards() -> None:
    answers = [completion([7] * length, [-1.0] * length) for length in (4, 8)]
    group = scored_group(0, [4], answers, [1.0, 1.0])
    rules = BatchRules(Overlong(max_new_tokens=8, buffer_tokens=4, penalty=0.5), scale="none")
    assert [sample.advantage for sample in make_batch([group], rules, version=0).samples] == [0.25, -0.25]
    sampling = {"max_new_tokens": 8}
    plain = config_for(Path("unused"), sampling=sampling)
    overlong = config_for(Path("unused"), sampling=sampling, loss={"overlong": {"buffer_tokens": 4}})
    no_baseline = config_for(Path("unused"), loss={"advantage": {"baseline": "none", "scale": "none"}})
    for test in (gradient_test, advantage_test):
        assert [test(config)(group) for config in (plain, overlong, no_baseline)] == [False, True, True]


OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "decoupled": {"loss": DECOUPLED},
    "kl": {"kl_ctl": 0.1},
    "kl, k2": {"kl_ctl": 0.1, "loss": {"kl": {"estimator": "k2"}}},
    "kl in the reward": {"kl_ctl": 0.1, "loss": {"kl": {"estimator": "k1", "place": "reward"}}},
    "entropy": {"loss": {"entropy_bonus": 0.1}},
    "leave one out": {"loss": {"advantage": {"baseline": "leave_one_out", "scale": "none"}}},
    "no baseline": {"loss": {"advantage": {"baseline": "none", "scale": "none"}}},
    "mean": {"loss": {"advantage": {"scale": "mean"}}},
    "tolerance": {"loss": {"advantage": {"tolerance": 0.5}}},
    "a tolerance that is too large": {"loss": {"advantage": {"tolerance": 1.0}}},
    "overlong": {"loss": {"overlong": {"buffer_tokens": 7}}},
    "leave out": {"loss": {"truncated": "leave_out"}},
    "leave out, kl": {"kl_ctl": 0.1, "loss": {"truncated": "leave_out"}},
    "truncated are zero": {"loss": {"truncated": "zero"}},
    "truncated lose": {"loss": {"truncated": "penalty"}},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_group_has_a_gradient_iff_autograd_finds_one(model_folder: Path, tmp_path: Path, objective: str) -> None:
    other = save_tiny_model(tmp_path / "other")
    _perturb(other)
    sampling = {"max_new_tokens": 8}
    config = config_for(model_folder, ref={"path": str(other)}, sampling=sampling, **OBJECTIVES[objective])
    learner = Learner(config)  # `begin` leaves its weights as they are
    short, long = ([7, 8], learner.sequence_logprobs((4, 5, 7, 8))[1:]), ([9], learner.sequence_logprobs((4, 5, 9))[1:])
    usable = [completion(*short), completion(*long)]
    groups: dict[str, tuple[list[Completion], list[float | None]]] = {
        "varied": (usable, [1.0, 0.0]),
        "equal": (usable, [1.0, 1.0]),
        "zeros": (usable, [0.0, 0.0]),
        "the only token is at the mean": ([*map(_without_tokens, usable), completion(*long)], [1.0, 0.0, 0.5]),
        "no token": ([*map(_without_tokens, usable)], [1.0, 0.0]),
        "not finite": ([completion(ids, [math.nan] * len(ids)) for ids, _ in (short, long)], [1.0, 0.0]),
        "one reward failed": ([*usable, completion(*long)], [1.0, 1.0, None]),
        "one truncated": ([usable[0], _cut(usable[1])], [1.0, 0.0]),
        "one truncated, equal": ([usable[0], _cut(usable[1])], [1.0, 1.0]),
        "all truncated": ([*map(_cut, usable)], [1.0, 0.0]),
        "the only one left is at the mean": ([*map(_cut, usable), completion(*long)], [1.0, 0.0, 0.5]),
    }
    for name, (answers, rewards) in groups.items():
        group = scored_group(0, [4, 5], answers, rewards)
        norm = learner.update([group], version=0).grad_norm
        assert gradient_test(config)(group) == (norm > 0), name
        learner = Learner(config)


def _without_tokens(plain: Completion) -> Completion:
    """All tokens are masked, as those of a tool are."""
    return completion([7, 8], [-1.0, -1.0], [0, 0])


def _cut(plain: Completion) -> Completion:
    return msgspec.structs.replace(plain, finish_reason="length")


def test_a_run_in_which_all_is_left_out_stops() -> None:
    answers = [completion([7] * length, [-1.0] * length) for length in (4, 8)]
    for baseline, scale in (("group", "group"), ("none", "none")):
        loss = {"truncated": "leave_out", "advantage": {"baseline": baseline, "scale": scale}}
        has_advantage = advantage_test(config_for(Path("unused"), loss=loss))
        assert has_advantage(scored_group(0, [4], [answers[0], _cut(answers[1])], [1.0, 0.0]))
        assert not has_advantage(scored_group(0, [4], [*map(_cut, answers)], [1.0, 0.0]))


def test_equal_rewards_stop_a_run_whatever_else_has_a_gradient() -> None:
    group = scored_group(0, [4], [completion([7], [-1.0])] * 2, [1.0, 1.0])
    for objective in ("kl", "entropy", "kl in the reward"):
        config = config_for(Path("unused"), **OBJECTIVES[objective])
        assert (gradient_test(config)(group), advantage_test(config)(group)) == (True, False)


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_reinforce_pp_has_a_mean_of_0_and_a_variance_of_1_over_the_tokens_of_the_batch(baseline: Baseline) -> None:
    """Over all mini-batches together, whether they hold a group of equal rewards or not, and without what failed."""
    lengths = [[2, 5, 1], [3, 3, 4]]
    rewards: list[list[float | None]] = [[1.0, 0.0, None], [0.5, 0.5, 0.5]]
    groups = [
        scored_group(number, [4], [completion([7] * n, [-1.0] * n) for n in row], values)
        for number, (row, values) in enumerate(zip(lengths, rewards, strict=True))
    ]
    rules = BatchRules(Overlong(8), baseline=baseline, scale="none", whitening="tokens", num_minibatches=2)
    batch = make_batch(groups, rules, version=0)
    assert len(batch.minibatches) == 2
    assert len(batch.samples) == len(batch.advantages) == 5
    tokens = [sample.advantage for sample in batch.samples for _ in range(sample.num_loss_tokens)]
    assert math.fsum(tokens) == pytest.approx(0.0, abs=1e-4)
    assert math.fsum(value**2 for value in tokens) / (len(tokens) - 1) == pytest.approx(1.0, rel=1e-4)
    assert batch.counts.num_degenerate_groups == 1


def test_equal_rewards_still_stop_a_run_whose_advantages_are_whitened() -> None:
    group = scored_group(0, [4], [completion([7], [-1.0])] * 2, [1.0, 1.0])
    config = config_for(Path("unused"), loss={"advantage": {"whitening": "tokens"}})
    assert (gradient_test(config)(group), advantage_test(config)(group)) == (True, False)


def test_lengths_show_a_bias_towards_long_or_short_completions() -> None:
    same = [completion([7] * 2, [-1.0] * 2) for _ in range(2)]
    different = [completion([7] * length, [-1.0] * length) for length in (5, 7)]
    groups = [scored_group(0, [4], same, [1.0, 1.0]), scored_group(1, [4], different, [1.0, 0.0])]
    counts = make_batch(groups, BatchRules(Overlong(8)), version=0).counts
    assert (counts.length_generated, counts.length_trained, counts.length_bias) == (4.0, 6.0, 1.5)
    assert (counts.reward_min, counts.reward_max) == (0.0, 1.0)
    assert counts.reward_std == pytest.approx(math.sqrt(3) / 4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]),
        ("cosine", [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]),
    ],
)
def test_schedules_warm_up_and_fall(schedule: str, expected: list[float]) -> None:
    section = OptimizerSection.model_validate({"warmup_steps": 2, "schedule": schedule, "min_lr_ratio": 0.1})
    factors = [schedule_factor(section, step, 12) for step in (0, 1, 2, 7, 12, 99)]
    assert factors == pytest.approx(expected)
    quarter = schedule_factor(section, 4, 12)
    shapes = {"constant": 1.0, "linear": 0.82, "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi / 5)) / 2}
    assert quarter == pytest.approx(shapes[schedule])


@pytest.mark.parametrize(("warmup_steps", "decay_steps"), [(10, 5), (10, 10), (1, 1)])
def test_a_schedule_that_ends_within_its_warm_up_is_refused(warmup_steps: int, decay_steps: int) -> None:
    keys = {"warmup_steps": warmup_steps, "decay_steps": decay_steps}
    with pytest.raises(ValidationError, match=r"optimizer\.decay_steps.*optimizer\.warmup_steps.*set it to 0"):
        OptimizerSection.model_validate({**keys, "schedule": "linear"})
    later = OptimizerSection.model_validate({**keys, "decay_steps": warmup_steps + 1, "schedule": "linear"})
    assert schedule_factor(later, warmup_steps + 1, warmup_steps + 1) == 0.0


def test_a_run_gives_its_length_to_the_schedule_and_stale_batches_smaller_steps(model_folder: Path) -> None:
    optimizer = {"lr": 1e-3, "schedule": "linear", "ess_base": 1.0}
    learner = Learner(config_for(model_folder, optimizer=optimizer), num_steps=4)
    results = [learner.update(example_groups(seed=step), version=0) for step in range(5)]
    for step, result in enumerate(results):
        ess = result.statistics.effective_sample_size_ratio
        assert ess < 1
        assert result.learning_rate == pytest.approx(1e-3 * max(0.0, 1 - step / 4) * ess**0.5)

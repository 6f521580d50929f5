"""Single parts of the objectives: a batch's threshold, learning rate, aggregation, shaping, KL estimators."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penstock_trainer import grpo


@pytest.mark.parametrize("tau", [0.0001, 0.04, 0.5, 1e9])
def test_the_second_moment_gate_drops_no_more_than_it_must(tau: float) -> None:
    log_rho = torch.randn(200, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    threshold = grpo.moment_threshold(log_rho, tau)
    squares = log_rho.square()
    kept = squares[squares < threshold]
    assert not kept.numel() or kept.mean() < tau
    if kept.numel() < squares.numel():
        with_next = torch.cat([kept, squares[squares >= threshold].min().reshape(1)])
        assert with_next.mean() >= tau
    assert grpo.moment_threshold(torch.zeros(0), tau) == math.inf
    assert grpo.moment_threshold(torch.tensor([0.3, -0.3, 0.3]), 0.09) == pytest.approx(0.09)  # ties: all or none


def test_a_gate_of_the_step_is_made_of_all_its_log_ratios() -> None:
    log_w = torch.tensor([0.1, -0.6, 0.2, 0.3])
    ratios = grpo.SamplerRatios(*(log_w[:2],) * 3)
    zeros, mask = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    tokens = grpo.Tokens(zeros, zeros, zeros, zeros, torch.zeros(2, dtype=torch.int64), num_sequences=1)
    gate = partial(grpo.second_moment_step_gate, tau=0.06)
    correction = grpo.Correction(step_gates={"m2po": gate})
    with pytest.raises(ValueError, match="m2po need all tokens"):
        correction(tokens, ratios, mask)
    step = grpo.StepTokens(log_w, *(torch.zeros(4),) * 6)
    weight, dropped = correction.prepared(step)(tokens, ratios, mask)
    assert weight.tolist() == [1.0, 0.0]
    assert {name: each.tolist() for name, each in dropped.items()} == {"m2po": [False, True]}


def test_the_learning_rate_follows_the_effective_sample_size() -> None:
    assert grpo.scaled_learning_rate(1e-3, 0.25, 1.0) == pytest.approx(0.5e-3)
    assert grpo.scaled_learning_rate(1e-3, 0.9, 0.5) == 1e-3
    assert grpo.scaled_learning_rate(1e-3, 0.01, 0.0) == 1e-3


AGGREGATIONS: list[grpo.Aggregation] = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm"]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_are_those_of_the_formula(aggregation: grpo.Aggregation) -> None:
    lengths = [[3, 1], [2, 5, 4]]  # two groups
    values = [[[float(10 * g + t) for t in range(n)] for g, n in enumerate(group)] for group in lengths]
    tokens = sum(map(sum, lengths))
    means = {
        "token-mean": sum(sum(map(sum, group)) for group in values) / tokens,
        "seq-mean-token-sum": sum(sum(map(sum, group)) / len(group) for group in values) / 2,
        "seq-mean-token-mean": sum(sum(sum(row) / len(row) for row in group) / len(group) for group in values) / 2,
        "token-sum-norm": sum(sum(sum(row) / 16 for row in group) / len(group) for group in values) / 2,
    }
    found = sum(
        sum(row)
        * grpo.sequence_weight(
            aggregation,
            num_groups=2,
            num_valid_in_group=len(group),
            num_tokens=len(row),
            num_tokens_in_batch=tokens,
            norm_length=16,
        )
        for group in values
        for row in group
    )
    assert found == pytest.approx(means[aggregation], rel=1e-12)


@pytest.mark.parametrize(("length", "expected"), [(0, 0.0), (12, 0.0), (14, -0.25), (16, -0.5), (20, -0.5)])
def test_overlong_completions_lose_up_to_the_penalty(length: int, expected: float) -> None:
    assert grpo.overlong_penalty(length, max_new_tokens=16, buffer_tokens=4, penalty=0.5) == expected
    assert grpo.overlong_penalty(length, max_new_tokens=16, buffer_tokens=0, penalty=0.5) == 0.0


def test_gradient_of_k2_is_that_of_the_divergence_and_k3_is_never_negative() -> None:
    log_ratio = torch.linspace(-5, 5, 101, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(grpo.kl_estimate(log_ratio, "k2").sum(), log_ratio)
    torch.testing.assert_close(slope, log_ratio.detach())
    assert grpo.kl_estimate(log_ratio, "k3").min().item() >= 0.0


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_importance_weighted_estimates_are_unbiased_and_unweighted_ones_on_policy(seed: int, size: int) -> None:
    """Sums over the full vocabulary instead of samples: the sampler's expectation of w * k equals the divergence."""
    generator = torch.Generator().manual_seed(seed)
    own, behaviour, reference = torch.log_softmax(torch.randn(3, size + 1, generator=generator).double(), -1)
    divergence = float((own.exp() * (own - reference)).sum())
    weights = behaviour.exp() * (own - behaviour).exp()
    estimators: list[grpo.Estimator] = ["k1", "k3"]
    for estimator in estimators:
        estimate = float((weights * grpo.kl_estimate(own - reference, estimator)).sum())
        assert estimate == pytest.approx(divergence, abs=1e-9)


def test_figures_of_experts_add_up_over_micro_batches() -> None:
    first, second = grpo.ExpertSums(((3, 1, 0, 0), (1, 1, 1, 1))), grpo.ExpertSums(((1, 3, 0, 0), (1, 1, 1, 1)))
    assert (first + second).counts == ((4, 4, 0, 0), (2, 2, 2, 2))
    assert (grpo.ExpertSums() + first).counts == first.counts == (first + grpo.ExpertSums()).counts
    figures = (first + second).figures
    assert figures["busiest_share"] == 0.5
    assert figures["entropy"] == pytest.approx((math.log(2) / math.log(4) + 1) / 2)
    assert grpo.ExpertSums().figures == {}

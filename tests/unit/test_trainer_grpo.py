"""The objective: properties, and values and gradients against an independent float64 implementation."""

import math
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock_trainer.grpo import (
    Statistics,
    Sums,
    Tokens,
    group_advantages,
    grpo_loss,
    kl_k3,
    policy_loss,
    sequence_weight,
)

EPS = 0.2


def tokens_of(
    logprobs: Tensor, behaviour: Tensor, advantage: Tensor, weight: Tensor, reference: Tensor | None = None
) -> Tokens:
    return Tokens(logprobs, behaviour, advantage, weight, reference)


def reference_loss(
    logprobs: list[Tensor],
    behaviour: list[list[float]],
    reference: list[list[float]],
    advantages: list[float],
    weights: list[float],
    kl_ctl: float,
) -> Tensor:
    """The formula, one scalar at a time, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for i, logprob_T in enumerate(logprobs):
        for t in range(logprob_T.numel()):
            if not math.isfinite(behaviour[i][t]):
                continue
            x = logprob_T[t] - behaviour[i][t]
            ratio = torch.exp(torch.clamp(x, -20, 20))
            clipped = min(max(float(ratio.detach()), 1 - EPS), 1 + EPS)
            use_ratio = float(ratio.detach()) * advantages[i] <= clipped * advantages[i]
            surrogate = ratio * advantages[i] if use_ratio else torch.tensor(clipped * advantages[i])
            y = reference[i][t] - logprob_T[t]
            total = total + weights[i] * (-surrogate + kl_ctl * (torch.exp(y) - 1 - y))
    return total


@pytest.mark.parametrize("kl_ctl", [0.0, 0.3])
def test_loss_and_gradient_equal_an_independent_float64_one(kl_ctl: float) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 5, 3, 2, 4]
    logprobs = [(-2 * torch.rand(n, generator=generator)).double().requires_grad_() for n in lengths]
    behaviour = [
        (values.detach() + 0.4 * torch.randn(len(values), generator=generator)).tolist() for values in logprobs
    ]
    behaviour[1][2] = math.nan
    behaviour[2][0] = -math.inf
    behaviour[3][1] = -60.0  # a ratio far beyond the clamp
    behaviour[4][0] = 40.0
    reference = [(values.detach() + 0.2).tolist() for values in logprobs]
    advantages, weights = [1.5, -0.7, 0.0, -1.2, 0.3], [0.5, 0.25, 0.25, 0.125, 0.125]
    expected = reference_loss(logprobs, behaviour, reference, advantages, weights, kl_ctl)
    expected_gradients = torch.autograd.grad(expected, logprobs)

    flat = torch.cat([values.detach() for values in logprobs]).float().requires_grad_()

    def repeated(values: list[float]) -> Tensor:
        return torch.tensor([value for value, n in zip(values, lengths, strict=True) for _ in range(n)])

    tokens = tokens_of(
        flat,
        torch.tensor(list(chain(*behaviour))),
        repeated(advantages),
        repeated(weights),
        torch.tensor(list(chain(*reference))) if kl_ctl else None,
    )
    loss, sums = grpo_loss(tokens, eps_clip=EPS, kl_ctl=kl_ctl)
    (gradient,) = torch.autograd.grad(loss, flat)

    assert loss.item() == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient.double(), torch.cat(expected_gradients), rtol=1e-4, atol=1e-6)
    assert (sums.num_tokens, sums.num_non_finite) == (13, 2)


@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=8),
    st.floats(-50, 50),
)
def test_advantages_do_not_change_when_rewards_shift(rewards: list[float], shift: float) -> None:
    values = torch.tensor([rewards], dtype=torch.float64).round(decimals=3)
    valid = torch.ones_like(values, dtype=torch.bool)
    moved = group_advantages(values + round(shift, 3), valid, 1e-6)
    original = group_advantages(values, valid, 1e-6)
    if float(values.max() - values.min()) > 0:
        torch.testing.assert_close(original, moved, rtol=1e-4, atol=1e-4)
    assert bool(torch.isfinite(original).all())


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e30, 1e-300])
def test_equal_rewards_give_exactly_zero(value: float) -> None:
    rewards = torch.full((1, 7), value, dtype=torch.float64)
    assert group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), 0.0).tolist() == [[0.0] * 7]


def test_failed_rewards_never_enter_mean_and_deviation() -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1e9], [math.nan, 0.0, 1.0, 1.0], [5.0, 7.0, 1.0, 1.0]])
    valid = torch.tensor([[True, True, True, False], [False, True, True, True], [True, False, False, False]])
    advantages = group_advantages(rewards, valid, 1e-6)
    alone = group_advantages(torch.tensor([[1.0, 0.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), 1e-6)
    assert advantages[0].tolist() == [*alone[0].tolist(), 0.0]
    assert sorted(advantages[1].tolist()) == sorted(advantages[0].tolist())
    assert advantages[2].tolist() == [0.0] * 4  # one valid reward has no deviation


def test_known_advantages() -> None:
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.ones(1, 4, dtype=torch.bool), 0.0)
    expected = 0.5 / math.sqrt(1 / 3)  # sample deviation of 0, 0, 1, 1
    torch.testing.assert_close(advantages, torch.tensor([[expected, -expected, -expected, expected]]))


def test_ratio_one_equals_reinforce() -> None:
    logprobs = torch.tensor([-0.5, -1.0, -2.0, -0.1], requires_grad=True)
    advantage, weight = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.5, 0.25, 0.25, 0.5])
    loss, sums = grpo_loss(tokens_of(logprobs, logprobs.detach(), advantage, weight), eps_clip=EPS, kl_ctl=0.0)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    (reinforce,) = torch.autograd.grad(-(weight * advantage * logprobs).sum(), logprobs)
    assert gradient.tolist() == reinforce.tolist()
    assert Statistics.of(sums).effective_sample_size_ratio == pytest.approx(1.0)
    assert Statistics.of(sums).behaviour_kl == 0.0


def test_zero_advantage_gives_exactly_zero_gradient() -> None:
    logprobs = torch.tensor([-0.5, -30.0, -1.0], requires_grad=True)
    behaviour = torch.tensor([-20.0, 0.0, math.nan])
    loss, _ = grpo_loss(tokens_of(logprobs, behaviour, torch.zeros(3), torch.ones(3)), eps_clip=EPS, kl_ctl=0.0)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [0.0] * 3


def test_clipping_stops_the_gradient_only_where_the_move_follows_the_advantage() -> None:
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    policy_loss(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), EPS).sum().backward()
    assert log_ratio.grad is not None
    assert [value != 0 for value in log_ratio.grad.tolist()] == [False, True, True, False]


@pytest.mark.parametrize("sizes", [[12], [1, 11], [5, 4, 3], [1] * 12])
def test_any_partition_into_micro_batches_sums_to_the_full_batch(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(2)
    logprobs = -torch.rand(12, generator=generator)
    behaviour = logprobs + 0.5 * torch.randn(12, generator=generator)
    behaviour[3] = math.inf
    advantage, weight = torch.randn(12, generator=generator), torch.rand(12, generator=generator)

    def run(parts: list[int]) -> tuple[float, Tensor, Statistics]:
        leaf = logprobs.clone().requires_grad_()
        total, sums = 0.0, Sums()
        pieces = zip(
            leaf.split(parts), behaviour.split(parts), advantage.split(parts), weight.split(parts), strict=True
        )
        for piece in pieces:
            loss, addend = grpo_loss(tokens_of(*piece), eps_clip=EPS, kl_ctl=0.0)
            loss.backward()
            total += loss.item()
            sums += addend
        assert leaf.grad is not None
        return total, leaf.grad, Statistics.of(sums)

    full, parts = run([12]), run(sizes)
    assert parts[0] == pytest.approx(full[0], abs=1e-6)
    torch.testing.assert_close(parts[1], full[1], rtol=1e-6, atol=0)  # vectorised and scalar exp differ in the last bit
    assert vars(parts[2]) == pytest.approx(vars(full[2]), rel=1e-5)


def test_k3_is_never_negative_and_flat_at_zero() -> None:
    log_ratio = torch.linspace(-5, 5, 101, requires_grad=True)
    values = kl_k3(log_ratio)
    assert values.detach().min().item() >= 0.0
    values.sum().backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad[50].item() == pytest.approx(0.0, abs=1e-6)


def test_weights_count_groups_and_their_valid_completions() -> None:
    assert sequence_weight(num_valid_in_group=8, num_groups=4) == 1 / 32


def test_statistics_without_tokens_are_finite() -> None:
    statistics = Statistics.of(Sums(num_non_finite=3))
    assert statistics.num_non_finite == 3
    assert all(math.isfinite(value) for value in vars(statistics).values())

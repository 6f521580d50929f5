"""KL terms and a teacher against the exact gradient of the divergence, over all completions of a tiny policy.

Completions count by their probability. The policy writes two of three tokens, the second given the first, so that nine
completions are all there are.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from penstock_trainer import grpo
from penstock_trainer.grpo import KlTerm, Objective, Tokens, kl_estimate, micro_batch_loss

KL_CTL = 0.3
ESTIMATORS: tuple[grpo.Estimator, ...] = ("k1", "k2", "k3")
COMPLETIONS = list(product(range(3), repeat=2))


@dataclass(frozen=True)
class Policy:
    """first: logits of the first token; second: of the second one, a row for each first one."""

    first: Tensor
    second: Tensor

    @classmethod
    def near(cls, seed: int, other: "Policy | None" = None, distance: float = 1.0) -> "Policy":
        generator = torch.Generator().manual_seed(seed)
        first, second = (torch.randn(shape, generator=generator).double() for shape in ((3,), (3, 3)))
        if other is None:
            return cls(first, second)
        return cls(other.first.detach() + distance * first, other.second.detach() + distance * second)

    def learned(self) -> "Policy":
        return Policy(self.first.clone().requires_grad_(), self.second.clone().requires_grad_())

    @property
    def logprobs(self) -> tuple[Tensor, Tensor]:
        return self.first.log_softmax(-1), self.second.log_softmax(-1)

    @property
    def logprobs_N(self) -> Tensor:
        """Of the tokens of all completions, one after the other."""
        first, second = self.logprobs
        return torch.stack([each for a, b in COMPLETIONS for each in (first[a], second[a, b])])

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in torch.autograd.grad(value, [self.first, self.second])])


def divergence(policy: Policy, other: Policy) -> tuple[Tensor, Tensor]:
    """KL(policy, other) of the first token, and of the second given each first one."""
    pairs = zip(policy.logprobs, other.logprobs, strict=True)
    first, second = ((own.exp() * (own - its)).sum(-1) for own, its in pairs)
    return first, second


def tokens_of(policy: Policy, sampler: Policy, reference: Policy) -> Tokens:
    """All completions, weighted by their probability under the sampler, so that sums are its means."""
    behaviour_N = sampler.logprobs_N.detach()
    sequence_N = torch.arange(len(COMPLETIONS)).repeat_interleave(2)
    probability_S = behaviour_N.view(-1, 2).sum(1).exp()
    return Tokens(
        logprobs_N=policy.logprobs_N,
        behaviour_logprobs_N=behaviour_N,
        advantage_N=torch.zeros_like(behaviour_N),
        weight_N=probability_S[sequence_N],
        sequence_N=sequence_N,
        num_sequences=len(COMPLETIONS),
        reference_logprobs_N=reference.logprobs_N.detach(),
    )


def loss_gradient(policy: Policy, tokens: Tokens, kl: KlTerm | None) -> Tensor:
    return policy.gradient(micro_batch_loss(tokens, Objective(grpo.reinforce, kl=kl))[0])


def reward_gradient(policy: Policy, reference: Policy, estimator: grpo.Estimator) -> Tensor:
    """Of the objective whose rewards are -KL_CTL times the sum of the estimates over the completion."""
    tokens = tokens_of(policy, policy, reference)
    kl_N = kl_estimate((policy.logprobs_N - reference.logprobs_N).detach(), estimator)
    penalties_S = tokens.sum_by_sequence(kl_N)
    return loss_gradient(policy, replace(tokens, advantage_N=-KL_CTL * tokens.spread(penalties_S)), None)


def exact_gradient(policy: Policy, reference: Policy) -> Tensor:
    """Of KL_CTL KL(policy, reference) over full completions: the second token's counts as often as its first one."""
    first, second = divergence(policy, reference)
    return policy.gradient(KL_CTL * (first + (policy.logprobs[0].exp() * second).sum()))


def exact_token_gradient(policy: Policy, sampler: Policy, reference: Policy, *, backwards: bool = False) -> Tensor:
    """Of KL_CTL times the divergence of each token given its prefix, for prefixes of the sampler."""
    first, second = divergence(reference, policy) if backwards else divergence(policy, reference)
    return policy.gradient(KL_CTL * (first + (sampler.logprobs[0].exp().detach() * second).sum()))


@pytest.mark.parametrize("seed", range(5))
def test_k1_in_the_reward_has_the_gradient_of_the_divergence(seed: int) -> None:
    reference = Policy.near(seed)
    policy = Policy.near(seed + 100, reference).learned()
    torch.testing.assert_close(reward_gradient(policy, reference, "k1"), exact_gradient(policy, reference))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_other_estimators_in_the_reward_hold_the_policy_to_nothing(estimator: grpo.Estimator, seed: int) -> None:
    """Why the configuration refuses them: near the reference their pull vanishes against that of the divergence."""
    reference = Policy.near(seed)
    shares = []
    for distance in (0.1, 0.01):
        policy = Policy.near(seed + 100, reference, distance).learned()
        exact = exact_gradient(policy, reference)
        shares.append(float(reward_gradient(policy, reference, estimator).norm() / exact.norm()))
    assert shares[0] < 0.25
    assert shares[1] < 0.025


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_importance_weighted_estimators_have_the_gradient_of_the_divergence_off_policy(
    estimator: grpo.Estimator, seed: int
) -> None:
    sampler, reference = Policy.near(seed), Policy.near(seed + 50)
    policy = Policy.near(seed + 100, reference).learned()
    found = loss_gradient(policy, tokens_of(policy, sampler, reference), KlTerm(KL_CTL, estimator, True))
    torch.testing.assert_close(found, exact_token_gradient(policy, sampler, reference))


@pytest.mark.parametrize("seed", range(5))
def test_unweighted_gradients_on_policy_are_those_that_the_docstring_names(seed: int) -> None:
    reference = Policy.near(seed)
    policy = Policy.near(seed + 100, reference).learned()
    terms = [KlTerm(KL_CTL, estimator) for estimator in ESTIMATORS]
    k1, k2, k3 = (loss_gradient(policy, tokens_of(policy, policy, reference), term) for term in terms)
    torch.testing.assert_close(k1, torch.zeros_like(k1))
    torch.testing.assert_close(k2, exact_token_gradient(policy, policy, reference))
    torch.testing.assert_close(k3, exact_token_gradient(policy, policy, reference, backwards=True))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("reward_weight", [0.0, 1.0])
def test_a_teacher_moves_the_policy_by_the_gradient_of_the_divergence_also_off_policy(
    seed: int, reward_weight: float
) -> None:
    """With each surrogate whose weight is w = exp(l - l_b); rewards beside it add their own policy gradient."""
    sampler, teacher = Policy.near(seed), Policy.near(seed + 50)
    policy = Policy.near(seed + 100, teacher).learned()
    tokens = tokens_of(policy, sampler, teacher)
    rewards_N = tokens.spread(torch.randn(len(COMPLETIONS), generator=torch.Generator().manual_seed(seed)).double())
    tokens = replace(tokens, advantage_N=rewards_N, teacher_logprobs_N=teacher.logprobs_N.detach())
    unclipped = partial(grpo.ppo_clip, eps_low=1.0, eps_high=1e9)
    alone = policy.gradient(micro_batch_loss(tokens_again(tokens, policy), Objective(unclipped))[0])
    for surrogate, correction in (
        (unclipped, grpo.Correction()),
        (grpo.reinforce, grpo.Correction(partial(grpo.truncated_weight, high=1e9))),
    ):
        objective = Objective(surrogate, correction=correction, teacher=grpo.TeacherTerm(KL_CTL, reward_weight))
        found = policy.gradient(micro_batch_loss(tokens_again(tokens, policy), objective)[0])
        expected = exact_token_gradient(policy, sampler, teacher) + reward_weight * alone
        torch.testing.assert_close(found, expected)


def tokens_again(tokens: Tokens, policy: Policy) -> Tokens:
    """With a graph of their own."""
    return replace(tokens, logprobs_N=policy.logprobs_N)

"""The objectives: values and gradients against closed forms in float64, and properties that hold for all of them."""

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from penstock_trainer import grpo
from penstock_trainer.grpo import KlTerm, Objective, Statistics, Sums, Tokens, micro_batch_loss
from tests.unit.trainer.grpo import grpo_reference as ref
from tests.unit.trainer.grpo.grpo_reference import Choice, Row, Token

RECOMPUTED: grpo.Proximal = "recomputed"
APPROXIMATED: grpo.Proximal = "approximated"
SURROGATES: dict[str, grpo.Surrogate] = {
    "ppo": partial(grpo.ppo_clip, eps_low=ref.EPS_LOW, eps_high=ref.EPS_HIGH),
    "dual": partial(grpo.ppo_clip, eps_low=ref.EPS_LOW, eps_high=ref.EPS_HIGH, dual_clip=ref.DUAL),
    "gspo": partial(grpo.gspo, eps_low=ref.EPS_LOW, eps_high=ref.EPS_HIGH),
    "cispo": partial(grpo.cispo, eps_low=ref.EPS_LOW, eps_high=ref.EPS_HIGH),
    "sapo": partial(grpo.sapo, tau_positive=ref.TAU_POSITIVE, tau_negative=ref.TAU_NEGATIVE),
    "dppo_tv": partial(grpo.dppo_tv, low=ref.TV, high=ref.TV),
    "dppo_kl": partial(grpo.dppo_kl, threshold=ref.BINARY_KL),
    "vespo": grpo.vespo,
    "reinforce": grpo.reinforce,
}
WEIGHTS: dict[str, grpo.Weight | None] = {
    "none": None,
    "tis": partial(grpo.truncated_weight, high=ref.HIGH),
    "clip": partial(grpo.clipped_weight, low=ref.LOW, high=ref.HIGH),
    "mask": partial(grpo.masked_weight, low=ref.LOW, high=ref.HIGH),
    "sequence_tis": partial(grpo.sequence_truncated_weight, high=ref.HIGH),
    "sequence_clip": partial(grpo.sequence_clipped_weight, low=ref.LOW, high=ref.HIGH),
    "sequence_mask": partial(grpo.sequence_masked_weight, low=ref.LOW, high=ref.HIGH),
}
GATES: dict[str, grpo.Gate] = {
    "geometric": partial(grpo.geometric_gate, low=ref.GEOMETRIC_LOW, high=ref.GEOMETRIC_HIGH),
    "k3": partial(grpo.k3_gate, high=ref.K3_HIGH),
    "veto": partial(grpo.veto_gate, low=ref.VETO_LOW, high=ref.VETO_HIGH),
    "opsm": partial(grpo.off_policy_gate, delta=ref.DELTA),
}
STEP_GATES: dict[str, grpo.StepGate] = {"m2po": partial(grpo.second_moment_step_gate, tau=ref.TAU)}
ALL_GATES = (*GATES, *STEP_GATES)
SELECTING: dict[str, grpo.StepGate] = {
    "entropy": partial(grpo.entropy_step_gate, share=ref.SHARE),
    "clip_cov": partial(grpo.clip_cov_step_gate, share=ref.SHARE, low=ref.COV_LOW, high=ref.COV_HIGH),
}
CHOICES = [
    *(Choice(surrogate=name) for name in SURROGATES),
    *(Choice(surrogate=name, proximal=RECOMPUTED, weight="tis") for name in ("ppo", "gspo", "cispo", "sapo")),
    *(Choice(surrogate=name, proximal=APPROXIMATED, weight="tis") for name in ("ppo", "dual", "gspo", "cispo", "sapo")),
    *(Choice(surrogate="reinforce", weight=name) for name in WEIGHTS),
    *(Choice(proximal=RECOMPUTED, weight=name) for name in WEIGHTS),
    *(Choice(proximal=APPROXIMATED, weight=name) for name in WEIGHTS),
    *(Choice(gate=name) for name in ALL_GATES),
    *(Choice(proximal=RECOMPUTED, weight="tis", gate=name) for name in ALL_GATES),
    *(Choice(proximal=APPROXIMATED, gate=name) for name in ALL_GATES),
    *(Choice(surrogate="reinforce", weight="tis", gate=name) for name in ALL_GATES),
    *(Choice(kl=name, kl_weighted=weighted) for name in ("k1", "k2", "k3") for weighted in (False, True)),
    Choice(bonus=0.01, kl="k3"),
    Choice(surrogate="reinforce", sampler_kl=0.2),
    *(Choice(surrogate="reinforce", weight=name, normalized=True) for name in WEIGHTS if name != "none"),
    Choice(proximal=RECOMPUTED, weight="clip", normalized=True, gate="m2po"),
    *(Choice(surrogate=name, selection="entropy") for name in ("ppo", "reinforce")),
    Choice(selection="clip_cov"),
    Choice(proximal=APPROXIMATED, weight="tis", selection="clip_cov", gate="opsm"),
    Choice(surrogate="cispo", selection="kl_cov"),
    Choice(proximal=RECOMPUTED, weight="tis", selection="kl_cov"),
    Choice(surrogate="dppo_tv", sampler_kl=0.2, gate="veto"),
    *(Choice(surrogate=name, teacher=True) for name in SURROGATES),
    Choice(proximal=RECOMPUTED, weight="tis", gate="opsm", kl="k3", teacher=True),
    Choice(proximal=APPROXIMATED, weight="tis", selection="clip_cov", gate="opsm", teacher=True),
    Choice(surrogate="cispo", selection="kl_cov", teacher=True),
]


KL_COV = partial(grpo.kl_cov_step_surrogate, share=ref.SHARE, coefficient=ref.COV_KL)


def example_rows(seed: int = 1, spread: float = 0.3, *, extreme: bool = True) -> list[Row]:
    """Ragged completions near and far from the sampler; also a zero advantage, masked tokens, an empty completion."""
    source = random.Random(seed)

    def token(lag: int) -> Token:
        own = -0.05 - 3 * source.random()
        behaviour = min(own + spread * source.gauss(0, 1), -1e-3)
        old = min(own + 0.1 * source.gauss(0, 1), -1e-3)
        reference, entropy, draw = own + 0.4 * source.gauss(0, 1), source.random(), source.random()
        return Token(own, old, behaviour, reference, lag, entropy, draw, own + 0.5 * math.sin(1000 * own))

    rows = [
        Row(tuple(token(source.randrange(4)) for _ in range(length)), advantage, weight)
        for length, advantage, weight in (
            (1, 1.5, 0.5),
            (5, -0.7, 0.25),
            (3, 0.0, 0.25),
            (0, 1.0, 0.1),
            (4, -1.2, 0.125),
            (6, 0.8, 0.2),
            (2, -0.4, 0.3),
        )
    ]
    if extreme:
        nan, inf = math.nan, math.inf
        for row, place, own, behaviour in (
            (1, 2, None, nan),
            (4, 0, None, -inf),
            (4, 2, -31.0, -1.0),
            (5, 1, -0.5, -30.5),
            (6, 0, None, nan),
            (6, 1, None, inf),
        ):
            tokens = list(rows[row].tokens)
            kept = tokens[place].own if own is None else own
            old = tokens[place].old if own is None else own - 0.1
            tokens[place] = replace(tokens[place], own=kept, old=old, behaviour=behaviour)
            rows[row] = replace(rows[row], tokens=tuple(tokens))
        far = replace(rows[5].tokens[4], reference=-35.0, teacher=-45.0)
        rows[5] = replace(rows[5], tokens=(*rows[5].tokens[:4], far, rows[5].tokens[5]))
    return rows


def objective_of(choice: Choice, tokens: Tokens) -> Objective:
    """tokens: all that are trained together, which parts of the objective depend on."""
    gates = {choice.gate: GATES[choice.gate]} if choice.gate in GATES else {}
    all_step_gates = {**STEP_GATES, **SELECTING}
    step_gates = {name: all_step_gates[name] for name in (choice.gate, choice.selection) if name in all_step_gates}
    unit: Literal["tokens", "sequences"] = "sequences" if choice.weight.startswith("sequence") else "tokens"
    objective = Objective(
        surrogate=SURROGATES[choice.surrogate],
        proximal=choice.proximal,
        correction=grpo.Correction(WEIGHTS[choice.weight], gates, step_gates, unit if choice.normalized else None),
        kl=KlTerm(ref.KL_CTL, choice.kl, choice.kl_weighted) if choice.kl else None,
        sampler_kl=choice.sampler_kl,
        entropy_bonus=choice.bonus,
        step_surrogate=KL_COV if choice.selection == "kl_cov" else None,
        teacher=grpo.TeacherTerm(ref.TEACHER_KL, ref.REWARD_WEIGHT) if choice.teacher else None,
    )
    return objective.prepared(objective.step_tokens(tokens))


def tokens_of(rows: Sequence[Row], dtype: torch.dtype = torch.float64) -> Tokens:
    flat = [(number, row, token) for number, row in enumerate(rows) for token in row.tokens]

    def tensor(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    return Tokens(
        logprobs_N=tensor([token.own for *_, token in flat]).requires_grad_(),
        behaviour_logprobs_N=tensor([token.behaviour for *_, token in flat]),
        advantage_N=tensor([row.advantage for _, row, _ in flat]),
        weight_N=tensor([row.weight for _, row, _ in flat]),
        sequence_N=torch.tensor([number for number, *_ in flat], dtype=torch.int64),
        num_sequences=len(rows),
        old_logprobs_N=tensor([token.old for *_, token in flat]),
        lag_N=tensor([token.lag for *_, token in flat]),
        reference_logprobs_N=tensor([token.reference for *_, token in flat]),
        entropy_N=tensor([token.entropy for *_, token in flat]).requires_grad_(),
        draw_N=tensor([token.draw for *_, token in flat]),
        teacher_logprobs_N=tensor([token.teacher for *_, token in flat]),
    )


def loss_and_gradients(tokens: Tokens, objective: Objective) -> tuple[float, list[float], list[float]]:
    loss, _ = micro_batch_loss(tokens, objective)
    assert tokens.entropy_N is not None
    both = torch.autograd.grad(loss, [tokens.logprobs_N, tokens.entropy_N], allow_unused=True)
    by_logprob, by_entropy = (None if each is None else each.tolist() for each in both)
    return loss.item(), by_logprob, by_entropy or [0.0] * tokens.logprobs_N.numel()


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, asdict(choice).values())))
def test_loss_and_gradient_equal_a_closed_form(choice: Choice) -> None:
    for seed in range(3):
        rows = example_rows(seed)
        expected = ref.loss_and_gradient(rows, choice)
        tokens = tokens_of(rows)
        loss, by_logprob, by_entropy = loss_and_gradients(tokens, objective_of(choice, tokens))
        assert loss == pytest.approx(expected[0], rel=1e-9)
        assert by_logprob == pytest.approx(expected[1], rel=1e-9, abs=1e-12)
        assert by_entropy == pytest.approx(expected[2])


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, asdict(choice).values())))
def test_float32_is_as_exact_as_it_can_be(choice: Choice) -> None:
    rows = example_rows(7, extreme=False)
    expected = ref.loss_and_gradient(rows, choice)
    tokens = tokens_of(rows, torch.float32)
    loss, by_logprob, _ = loss_and_gradients(tokens, objective_of(choice, tokens))
    assert loss == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert by_logprob == pytest.approx(expected[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, asdict(choice).values())))
@pytest.mark.parametrize("sizes", [(1, 6), (2, 2, 3), (1,) * 7])
def test_micro_batches_of_any_partition_sum_to_the_full_batch(choice: Choice, sizes: tuple[int, ...]) -> None:
    rows = example_rows()
    objective = objective_of(choice, tokens_of(rows))
    full_loss, full_gradient, _ = loss_and_gradients(tokens_of(rows), objective)
    full = Statistics.of(micro_batch_loss(tokens_of(rows), objective)[1])
    loss, sums, start = 0.0, Sums(), 0
    gradient: list[float] = []
    for size in sizes:
        part = tokens_of(rows[start : start + size])
        part_loss, part_gradient, _ = loss_and_gradients(part, objective)
        sums += micro_batch_loss(part, objective)[1]
        loss, gradient, start = loss + part_loss, gradient + part_gradient, start + size
    assert loss == pytest.approx(full_loss, rel=1e-12)
    assert gradient == pytest.approx(full_gradient, rel=1e-12)
    for name, value in asdict(full).items():
        if value is not None:  # teacher_kl, without a teacher
            assert asdict(Statistics.of(sums))[name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, asdict(choice).values())))
def test_the_order_of_completions_does_not_matter(choice: Choice) -> None:
    rows = example_rows()
    objective = objective_of(choice, tokens_of(rows))
    order = random.Random(3).sample(range(len(rows)), len(rows))
    loss, gradient, _ = loss_and_gradients(tokens_of(rows), objective)
    moved_loss, moved_gradient, _ = loss_and_gradients(tokens_of([rows[i] for i in order]), objective)
    starts = [sum(len(row.tokens) for row in rows[:i]) for i in range(len(rows))]
    expected = [gradient[starts[i] + t] for i in order for t in range(len(rows[i].tokens))]
    assert moved_loss == pytest.approx(loss, rel=1e-12)
    assert moved_gradient == pytest.approx(expected, rel=1e-12)


ON_POLICY = [c for c in CHOICES if not (c.kl or c.selection or c.teacher) and c.surrogate != "gspo"]


@pytest.mark.parametrize("choice", ON_POLICY, ids=lambda choice: "-".join(map(str, asdict(choice).values())))
def test_on_policy_every_surrogate_has_the_gradient_of_reinforce(choice: Choice) -> None:
    rows = [
        replace(row, tokens=tuple(replace(token, old=token.own, behaviour=token.own) for token in row.tokens))
        for row in example_rows(extreme=False)
    ]
    tokens = tokens_of(rows)
    objective = objective_of(choice, tokens)
    _, gradient, _ = loss_and_gradients(tokens, objective)
    assert gradient == pytest.approx((-tokens.weight_N * tokens.advantage_N).tolist(), rel=1e-12)
    statistics = Statistics.of(micro_batch_loss(tokens, objective)[1])
    assert statistics.behaviour_kl == 0.0
    assert statistics.effective_sample_size_ratio == pytest.approx(1.0)


@pytest.mark.parametrize(
    "choice",
    [c for c in CHOICES if not (c.kl or c.sampler_kl or c.teacher or c.selection == "kl_cov")],
    ids=lambda c: "-".join(map(str, asdict(c).values())),
)
def test_a_zero_advantage_has_exactly_no_gradient(choice: Choice) -> None:
    rows = [replace(row, advantage=0.0) for row in example_rows()]
    tokens = tokens_of(rows)
    _, gradient, _ = loss_and_gradients(tokens, objective_of(choice, tokens))
    assert set(gradient) == {0.0}


@pytest.mark.parametrize("proximal", ["none", RECOMPUTED, APPROXIMATED])
@pytest.mark.parametrize("gate", ALL_GATES)
def test_every_gate_drops_what_is_two_nats_from_the_sampler_at_lag_1(gate: str, proximal: grpo.Proximal) -> None:
    """With an approximated proximal policy the interpolation is the sampler there: no gate may look at it."""
    near, far = Token(-1.0, -1.0, -1.0, -1.0, 1, 0.0), Token(-8.0, -8.0, -6.0, -8.0, 1, 0.0)
    rows = [Row((near,) * 4, 1.0, 1.0), Row((far,) * 3, -1.0, 1.0), Row((near,), -1.0, 1.0)]
    if gate == "veto":
        rows[1] = Row((replace(far, own=-18.0, old=-18.0),) * 3, -1.0, 1.0)
    tokens = tokens_of(rows)
    _, sums = micro_batch_loss(tokens, objective_of(Choice(proximal=proximal, gate=gate), tokens))
    assert Statistics.of(sums).masked == {"non_finite": 0.0, gate: 3 / 8}


@pytest.mark.parametrize("proximal", ["none", RECOMPUTED, APPROXIMATED])
@pytest.mark.parametrize("gate", ["opsm", "m2po"])
def test_opsm_and_m2po_look_at_the_policy_now(gate: str, proximal: grpo.Proximal) -> None:
    """The first completion has left the sampler during this update, the second one has come back to it."""
    left, back = Token(-3.0, -1.0, -1.0, -1.0, 3, 0.0), Token(-1.0, -3.0, -1.0, -1.0, 3, 0.0)
    tokens = tokens_of([Row((left,) * 2, -1.0, 1.0), Row((back,) * 2, -1.0, 1.0)])
    objective = objective_of(Choice(proximal=proximal, gate=gate), tokens)
    _, gradient, _ = loss_and_gradients(tokens, replace(objective, surrogate=grpo.reinforce))
    assert gradient == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("gate", ALL_GATES)
def test_a_gate_changes_no_weight_of_what_it_keeps(gate: str) -> None:
    tokens = tokens_of(example_rows())
    plain = Choice(surrogate="reinforce", weight="tis")
    _, without, _ = loss_and_gradients(tokens, objective_of(plain, tokens))
    _, gated, _ = loss_and_gradients(tokens, objective_of(replace(plain, gate=gate), tokens))
    assert {(mine == 0.0 or mine == other) for mine, other in zip(gated, without, strict=True)} == {True}
    assert any(gated)
    assert gated != without


def test_log_probabilities_from_the_start_of_the_update_anchor_ratio_and_correction() -> None:
    rows = example_rows(extreme=False)
    tokens = tokens_of(rows)
    old_logprobs_N = tokens.logprobs_N.detach() - 0.1
    decoupled = objective_of(Choice(proximal=RECOMPUTED, weight="tis"), tokens)
    _, gradient, _ = loss_and_gradients(replace(tokens, old_logprobs_N=old_logprobs_N), decoupled)
    rho_N = (old_logprobs_N - tokens.behaviour_logprobs_N).exp().clamp(max=ref.HIGH)
    expected_N = -tokens.weight_N * rho_N * math.exp(0.1) * tokens.advantage_N  # inside the clip range
    assert gradient == pytest.approx(expected_N.tolist(), rel=1e-9)


def test_a_teacher_needs_its_log_probabilities_and_shows_the_mean_reverse_divergence() -> None:
    rows = example_rows()
    tokens = tokens_of(rows)
    objective = Objective(SURROGATES["ppo"], teacher=grpo.TeacherTerm(1.0))
    with pytest.raises(ValueError, match="needs teacher_logprobs_N"):
        micro_batch_loss(replace(tokens, teacher_logprobs_N=None), objective)
    seen = [token for row in rows for token in row.tokens if token.is_usable]
    expected = sum(ref.clamped(token.own - token.teacher)[0] for token in seen) / len(seen)
    assert Statistics.of(micro_batch_loss(tokens, objective)[1]).teacher_kl == pytest.approx(expected)
    assert Statistics.of(micro_batch_loss(tokens, Objective(SURROGATES["ppo"]))[1]).teacher_kl is None


def test_what_is_limited_and_dropped_is_counted_by_reason() -> None:
    tokens = Tokens(
        logprobs_N=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0]).requires_grad_(),
        behaviour_logprobs_N=torch.tensor([0.5, -0.5, 6.0, math.nan, 0.0]),
        advantage_N=torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0]),
        weight_N=torch.ones(5),
        sequence_N=torch.arange(5),
        num_sequences=5,
    )
    correction = grpo.Correction(None, {"veto": partial(grpo.veto_gate, low=0.01, high=100.0)})
    statistics = Statistics.of(micro_batch_loss(tokens, Objective(SURROGATES["ppo"], correction=correction))[1])
    assert (statistics.num_tokens, statistics.num_non_finite) == (4, 1)
    assert (statistics.clipped_ratio_low, statistics.clipped_ratio_high) == (0.25, 0.25)
    assert statistics.masked == {"non_finite": 0.2, "veto": 0.25}
    assert (statistics.ratio_min, statistics.ratio_max) == pytest.approx((math.exp(-6), math.exp(0.5)))
    ratios = [math.exp(-0.5), math.exp(0.5), math.exp(-6), 1.0]
    ess = sum(ratios) ** 2 / (4 * sum(value**2 for value in ratios))
    assert statistics.effective_sample_size_ratio == pytest.approx(ess)


def tokens_of_log_weights(log_weights: Sequence[float], dtype: torch.dtype = torch.float64) -> Tokens:
    """Completions of four tokens, each a quarter of the way."""
    steps = [each / 4 for each in log_weights for _ in range(4)]
    zeros_N = torch.zeros(len(steps), dtype=dtype)
    return Tokens(
        logprobs_N=zeros_N.clone().requires_grad_(),
        behaviour_logprobs_N=-torch.tensor(steps, dtype=dtype),
        advantage_N=zeros_N,
        weight_N=zeros_N,
        sequence_N=torch.arange(len(log_weights)).repeat_interleave(4),
        num_sequences=len(log_weights),
    )


def effective_sample_size_ratio(log_weights: Sequence[float], sizes: Sequence[int]) -> float:
    sums, start = Sums(), 0
    for size in sizes:
        part = tokens_of_log_weights(log_weights[start : start + size])
        sums, start = sums + micro_batch_loss(part, Objective(SURROGATES["ppo"]))[1], start + size
    return Statistics.of(sums).effective_sample_size_ratio


@pytest.mark.parametrize(
    ("log_weights", "expected"),
    [
        ((60.0, 40.0, 40.0, 40.0), 0.25),  # one completion has all the weight
        ((400.0, 100.0, 21.0, -2000.0), 0.25),
        ((-100.0, -150.0, -160.0, -170.0), 0.25),
        ((900.0, 900.0, -900.0, 850.0), 0.5),
        ((-3000.0, -3000.0, -3000.0, -3000.0), 1.0),
        ((30.0, 30.0, 30.0, 30.0), 1.0),
    ],
)
@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 2), (1, 1, 1, 1)])
def test_the_effective_sample_size_has_no_ceiling_for_weights(
    log_weights: tuple[float, ...], expected: float, sizes: tuple[int, ...]
) -> None:
    assert effective_sample_size_ratio(log_weights, sizes) == pytest.approx(expected)


@given(st.lists(st.floats(-800, 800), min_size=1, max_size=6), st.data())
def test_the_effective_sample_size_is_that_of_the_weights_in_any_partition(
    log_weights: list[float], data: st.DataObject
) -> None:
    largest = max(log_weights)
    weights = [math.exp(each - largest) for each in log_weights]  # a common factor cancels
    expected = math.fsum(weights) ** 2 / (len(weights) * math.fsum(each**2 for each in weights))
    cut = data.draw(st.integers(0, len(weights)))
    sizes = [size for size in (cut, len(weights) - cut) if size]
    assert effective_sample_size_ratio(log_weights, sizes) == pytest.approx(expected, rel=1e-9)


def test_an_entropy_bonus_without_an_entropy_is_refused() -> None:
    tokens = tokens_of(example_rows())
    objective = Objective(SURROGATES["ppo"], entropy_bonus=0.01)
    assert tokens.entropy_N is not None
    with pytest.raises(ValueError, match="needs entropy_N"):
        micro_batch_loss(replace(tokens, entropy_N=None), objective)
    with pytest.raises(ValueError, match="needs the gradient of entropy_N"):
        micro_batch_loss(replace(tokens, entropy_N=tokens.entropy_N.detach()), objective)


def test_without_tokens_nothing_is_measured() -> None:
    """nan is no figure of a policy; the loss of a batch whose tokens are all left out is one that was computed."""
    statistics = asdict(Statistics.of(Sums({"non_finite": 3.0, "loss_entropy": -0.5})))
    assert statistics.pop("masked") == {"non_finite": 1.0}
    assert (statistics.pop("num_tokens"), statistics.pop("num_non_finite")) == (0, 3)
    assert [statistics.pop(f"loss_{part}") for part in ("policy", "kl", "sampler_kl", "entropy")] == [
        0.0,
        0.0,
        0.0,
        -0.5,
    ]
    assert statistics.pop("teacher_kl") is None
    assert statistics.pop("experts") == {}
    assert all(math.isnan(value) for value in statistics.values()), statistics
    nothing = Statistics.of(Sums())
    assert all(map(math.isnan, (nothing.loss_policy, nothing.clipped_ratio, nothing.masked["non_finite"])))
    assert Sums().weights.effective_sample_size_ratio == 1.0, "which scales no learning rate"

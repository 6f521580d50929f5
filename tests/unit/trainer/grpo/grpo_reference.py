"""A second implementation of the GRPO family, one scalar at a time: closed forms in float64, without autograd.

Written from the papers and not from the code under test. A completion is a list of tokens; every function returns what
belongs to one of them. Sources of the corrections: geometric means of completions (Liu and Li, "When Speed Kills
Stability", part 3), k3 and vetoes (verl's rollout correction), OPSM (DeepSeek-V3.2, arXiv 2512.02556), M2PO (arXiv
2510.01161).
"""

import math
from dataclasses import dataclass
from typing import Literal

CLAMP = 20.0


@dataclass(frozen=True)
class Token:
    """l now and at the start of the update, l_b, l_r, versions from sampler to trainer, entropy, draw, l_T."""

    own: float
    old: float
    behaviour: float
    reference: float
    lag: int
    entropy: float
    draw: float = 0.0
    teacher: float = 0.0

    @property
    def is_usable(self) -> bool:
        return math.isfinite(self.behaviour)


@dataclass(frozen=True)
class Row:
    """One completion."""

    tokens: tuple[Token, ...]
    advantage: float
    weight: float


@dataclass(frozen=True)
class Choice:
    """An objective, by the names of its parts."""

    surrogate: str = "ppo"
    proximal: Literal["none", "recomputed", "approximated"] = "none"
    weight: str = "none"
    gate: str = ""
    kl: Literal["", "k1", "k2", "k3"] = ""
    kl_weighted: bool = False
    bonus: float = 0.0
    sampler_kl: float = 0.0
    normalized: bool = False
    selection: Literal["", "entropy", "clip_cov", "kl_cov"] = ""
    teacher: bool = False


EPS_LOW, EPS_HIGH, DUAL = 0.2, 0.28, 3.0
TAU_POSITIVE, TAU_NEGATIVE = 1.0, 1.05
TV, BINARY_KL = 0.1, 0.05
LOW, HIGH = 0.5, 2.0
GEOMETRIC_LOW, GEOMETRIC_HIGH = 0.9, 1.1
K3_HIGH = 0.03
SHARE, COV_LOW, COV_HIGH, COV_KL = 0.3, 0.1, 2.0, 0.7
VETO_LOW, VETO_HIGH = 1e-4, 100.0
DELTA, KL_CTL, TAU = 0.1, 0.3, 0.04
TEACHER_KL, REWARD_WEIGHT = 0.7, 0.5


def clamped(x: float) -> tuple[float, float]:
    """The clamped log-ratio and its derivative."""
    return max(-CLAMP, min(CLAMP, x)), float(-CLAMP < x < CLAMP)


def advantage_of(row: Row, token: Token, choice: Choice) -> float:
    """The completion's, or with a teacher the token's own: the negative reverse KL beside it."""
    if not choice.teacher:
        return row.advantage
    return REWARD_WEIGHT * row.advantage - TEACHER_KL * clamped(token.own - token.teacher)[0]


def anchor(token: Token, proximal: str) -> float:
    """The anchor from which ratios are measured."""
    if proximal == "none":
        return token.behaviour
    if proximal == "recomputed":
        return token.old
    share = 0.0 if token.lag <= 0 else min(1.0, max(0.0, (token.lag - 1) / token.lag))
    return token.behaviour + share * (token.own - token.behaviour)


def to_anchor(token: Token, proximal: str) -> float:
    """Log of the importance weight: from the sampler to the policy that the surrogate's ratio starts from.

    Without a proximal policy only surrogates without a ratio have a weight, and theirs leads to the policy itself.
    """
    return clamped((token.own if proximal == "none" else anchor(token, proximal)) - token.behaviour)[0]


def to_policy(token: Token) -> float:
    """log pi_theta / pi_behaviour, of the policy that is being trained, as OPSM and M2PO have it."""
    return clamped(token.own - token.behaviour)[0]


def to_trainer(token: Token, proximal: str) -> float:
    """log pi_old / pi_rollout if there is a policy pi_old, else log pi_theta / pi_rollout: no interpolation is one."""
    return clamped(token.old - token.behaviour)[0] if proximal == "recomputed" else to_policy(token)


def clip_loss(ratio: float, slope: float, advantage: float, dual: float | None) -> tuple[float, float]:
    clip = min(max(ratio, 1 - EPS_LOW), 1 + EPS_HIGH)
    unclipped = ratio * advantage <= clip * advantage
    loss, gradient = (-ratio * advantage, -slope * advantage) if unclipped else (-clip * advantage, 0.0)
    if dual is not None and advantage < 0 and loss > -dual * advantage:
        return -dual * advantage, 0.0
    return loss, gradient


def surrogate(row: Row, token: Token, choice: Choice) -> tuple[float, float]:
    """Loss of a token and its derivative by the token's own l (GSPO: as if the other tokens were constants)."""
    usable = [each for each in row.tokens if each.is_usable]
    advantage = advantage_of(row, token, choice)
    x, dx = clamped(token.own - anchor(token, choice.proximal))
    ratio = math.exp(x)
    name = choice.surrogate
    if name in ("ppo", "dual"):
        return clip_loss(ratio, ratio * dx, advantage, DUAL if name == "dual" else None)
    if name == "gspo":
        s = math.exp(sum(clamped(each.own - anchor(each, choice.proximal))[0] for each in usable) / len(usable))
        return clip_loss(s, s, advantage, None)
    if name == "sapo":
        tau = TAU_POSITIVE if advantage > 0 else TAU_NEGATIVE
        gate = 1 / (1 + math.exp(-tau * (ratio - 1))) if tau * (ratio - 1) < 700 else 1.0
        return -4 / tau * gate * advantage, -4 * gate * (1 - gate) * ratio * dx * advantage
    if name == "cispo":
        factor = min(max(ratio, 1 - EPS_LOW), 1 + EPS_HIGH)
    elif name == "vespo":
        log_w = sum(clamped(each.own - each.behaviour)[0] for each in usable)
        log_w = min(max(log_w, math.log(1e-8)), 20.0)
        k, lam = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
        factor = math.exp(lam + k * log_w - lam * math.exp(log_w))
    elif name in ("dppo_tv", "dppo_kl"):
        factor = min(ratio, 20.0) if keeps(name, advantage, token) else 0.0
    else:
        factor = 1.0
    return -factor * advantage * token.own, -factor * advantage


def keeps(name: str, advantage: float, token: Token) -> bool:
    p, b = math.exp(token.own), math.exp(token.behaviour)
    if name == "dppo_tv":
        return p - b <= TV if advantage > 0 else p - b >= -TV
    divergence = b * math.log(b / p) + (1 - b) * (math.log1p(-b) - math.log1p(-p))
    follows = (advantage > 0 and p > b) or (advantage < 0 and p < b)
    return not (follows and divergence > BINARY_KL)


def importance(row: Row, token: Token, choice: Choice) -> float:
    value = math.exp(to_anchor(token, choice.proximal))
    logs = [to_anchor(each, choice.proximal) for each in row.tokens if each.is_usable]
    product = math.exp(max(-CLAMP, min(CLAMP, sum(logs))))
    return {
        "none": 1.0,
        "tis": min(value, HIGH),
        "clip": max(LOW, min(value, HIGH)),
        "mask": value if LOW <= value <= HIGH else 0.0,
        "sequence_tis": min(product, HIGH),
        "sequence_clip": max(LOW, min(product, HIGH)),
        "sequence_mask": product if LOW <= product <= HIGH else 0.0,
    }[choice.weight]


def passes(row: Row, token: Token, choice: Choice) -> bool:
    """Whether the gate keeps a token of the completion."""
    usable = [each for each in row.tokens if each.is_usable]
    if choice.gate == "geometric":
        mean = math.prod(math.exp(to_trainer(each, choice.proximal)) for each in usable) ** (1 / len(usable))
        return GEOMETRIC_LOW <= mean <= GEOMETRIC_HIGH
    if choice.gate == "k3":  # verl's seq_mean_k3: the mean over the tokens of exp(x) - 1 - x
        logs = [to_trainer(each, choice.proximal) for each in usable]
        return sum(math.exp(x) - 1 - x for x in logs) / len(logs) <= K3_HIGH
    if choice.gate == "veto":
        ratios = [math.exp(to_trainer(each, choice.proximal)) for each in usable]
        return min(ratios) >= VETO_LOW and max(ratios) <= VETO_HIGH
    if choice.gate == "opsm":  # the paper's pi_old is the policy that sampled
        is_good = advantage_of(row, token, choice) >= 0
        return is_good or sum(-to_policy(each) for each in usable) / len(usable) <= DELTA
    return True


def largest_kept_square(rows: list[Row]) -> float:
    """The largest square that is left; -1 if none is.

    M2PO: of the tokens that are trained together, those with the largest (log pi_theta / pi_behaviour)^2 are masked
    until the mean of the rest is below tau.
    """
    squares = sorted(to_policy(token) ** 2 for row in rows for token in row.tokens if token.is_usable)
    while squares and sum(squares) / len(squares) >= TAU:
        squares = [each for each in squares if each < squares[-1]]
    return squares[-1] if squares else -1.0


def mean_importance(rows: list[Row], choice: Choice) -> float:
    """verl's rollout_is_batch_normalize: over tokens, or over sequences; without what a mask has dropped."""
    usable = [(row, [each for each in row.tokens if each.is_usable]) for row in rows]
    if choice.weight.startswith("sequence"):
        values = [importance(row, tokens[0], choice) for row, tokens in usable if tokens]
    else:
        values = [importance(row, each, choice) for row, tokens in usable for each in tokens]
    kept = [value for value in values if value > 0]
    return sum(kept) / len(kept)


def selected(rows: list[Row], choice: Choice) -> list[Token]:
    """entropy: the tokens that stay; clip_cov: those that are dropped; kl_cov: those that are held."""
    flat = [(advantage_of(row, token, choice), token) for row in rows for token in row.tokens if token.is_usable]
    mean_advantage = sum(advantage for advantage, _ in flat) / len(flat)
    mean_own = sum(token.own for _, token in flat) / len(flat)
    covariances = [((advantage - mean_advantage) * (token.own - mean_own), token) for advantage, token in flat]
    if choice.selection == "entropy":
        by_entropy = sorted((token for _, token in flat), key=lambda token: -token.entropy)
        return by_entropy[: math.ceil(SHARE * len(flat))]
    count = max(int(SHARE * len(flat)), 1)
    if choice.selection == "kl_cov":
        return [token for _, token in sorted(covariances, key=lambda pair: -pair[0])[:count]]
    between = [token for value, token in covariances if COV_LOW < value < COV_HIGH]
    assert len(between) > 1
    return sorted(between, key=lambda token: token.draw)[:count]


def kl(token: Token, choice: Choice) -> tuple[float, float]:
    y, dy = clamped(token.own - token.reference)
    value, slope = {
        "k1": (y, dy),
        "k2": (y * y / 2, y * dy),
        "k3": (math.exp(-y) - 1 + y, (1 - math.exp(-y)) * dy),
    }[choice.kl]
    if not choice.kl_weighted:
        return value, slope
    x, dx = clamped(token.own - token.behaviour)
    if choice.kl == "k2":  # its slope is that of the divergence already
        dx = 0.0
    return math.exp(x) * value, math.exp(x) * (dx * value + slope)


def loss_and_gradient(rows: list[Row], choice: Choice) -> tuple[float, list[float], list[float]]:
    """The loss, and its derivatives by every l and by every entropy, in the order of rows and tokens."""
    total, by_logprob, by_entropy = 0.0, [], []
    largest = largest_kept_square(rows) if choice.gate == "m2po" else math.inf
    mean = mean_importance(rows, choice) if choice.normalized else 1.0
    chosen = {id(token) for token in selected(rows, choice)} if choice.selection else set()
    for row in rows:
        for token in row.tokens:
            if not token.is_usable:
                by_logprob.append(0.0)
                by_entropy.append(0.0)
                continue
            is_kept = passes(row, token, choice) and to_policy(token) ** 2 <= largest
            is_chosen = id(token) in chosen
            if (choice.selection == "entropy" and not is_chosen) or (choice.selection == "clip_cov" and is_chosen):
                is_kept = False
            factor = importance(row, token, choice) / mean if is_kept else 0.0
            value, slope = surrogate(row, token, choice)
            if choice.selection == "kl_cov" and is_chosen:
                x, dx = clamped(token.own - anchor(token, choice.proximal))
                value, slope = value + COV_KL * abs(x), slope + COV_KL * math.copysign(1.0, x) * dx
            value, slope = factor * value, factor * slope
            if choice.kl:
                kl_value, kl_slope = kl(token, choice)
                value, slope = value + KL_CTL * kl_value, slope + KL_CTL * kl_slope
            x, dx = clamped(token.own - token.behaviour)  # DRO: beta / 2 times the square
            value, slope = value + choice.sampler_kl / 2 * x**2, slope + choice.sampler_kl * x * dx
            total += row.weight * (value - choice.bonus * token.entropy)
            by_logprob.append(row.weight * slope)
            by_entropy.append(-row.weight * choice.bonus)
    return total, by_logprob, by_entropy

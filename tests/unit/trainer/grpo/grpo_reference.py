"""A second implementation of the GRPO family, one scalar at a time: closed forms in float64, without autograd.

It is written from the formulas, not from the code under test. A completion is a list of tokens; each function returns
the value of one token.
"""

import math
from dataclasses import dataclass
from typing import Literal

CLAMP = 20.0


@dataclass(frozen=True)
class Token:
    """One token: l, l_b, l_r, its staleness, its entropy."""

    own: float
    behaviour: float
    reference: float
    lag: int
    entropy: float

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


EPS_LOW, EPS_HIGH, DUAL = 0.2, 0.28, 3.0
TAU_POSITIVE, TAU_NEGATIVE = 1.0, 1.05
TV, BINARY_KL = 0.1, 0.05
LOW, HIGH = 0.5, 2.0
GEOMETRIC_LOW, GEOMETRIC_HIGH = 0.9, 1.1
VETO_LOW, VETO_HIGH = 1e-4, 100.0
DELTA, KL_CTL, MOMENT_THRESHOLD = 0.1, 0.3, 0.05


def clamped(x: float) -> tuple[float, float]:
    """The clamped log-ratio and its derivative."""
    return max(-CLAMP, min(CLAMP, x)), float(-CLAMP < x < CLAMP)


def anchor(token: Token, proximal: str) -> float:
    """The anchor from which ratios are measured."""
    if proximal == "none":
        return token.behaviour
    if proximal == "recomputed":
        return token.own
    share = 0.0 if token.lag <= 0 else min(1.0, max(0.0, (token.lag - 1) / token.lag))
    return token.behaviour + share * (token.own - token.behaviour)


def rho(token: Token, proximal: str) -> float:
    """Clamped log-ratio of the proximal policy to the sampler."""
    corrected = token.own if proximal == "none" else anchor(token, proximal)
    return clamped(corrected - token.behaviour)[0]


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
    advantage = row.advantage
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


def correction(row: Row, token: Token, choice: Choice) -> float:
    usable = [each for each in row.tokens if each.is_usable]
    value = math.exp(rho(token, choice.proximal))
    logs = [rho(each, choice.proximal) for each in usable]
    product = math.exp(max(-CLAMP, min(CLAMP, sum(logs))))
    factor = {
        "none": 1.0,
        "tis": min(value, HIGH),
        "mask": value if LOW <= value <= HIGH else 0.0,
        "sequence_tis": min(product, HIGH),
        "sequence_mask": product if LOW <= product <= HIGH else 0.0,
    }[choice.weight]
    mean = sum(logs) / len(logs)
    keep = {
        "": True,
        "geometric": GEOMETRIC_LOW <= math.exp(mean) <= GEOMETRIC_HIGH,
        "veto": all(VETO_LOW <= math.exp(each) <= VETO_HIGH for each in logs),
        "opsm": not (row.advantage < 0 and -mean > DELTA),
        "m2po": rho(token, choice.proximal) ** 2 < MOMENT_THRESHOLD,
    }[choice.gate]
    return factor if keep else 0.0


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
    return math.exp(x) * value, math.exp(x) * (dx * value + slope)


def loss_and_gradient(rows: list[Row], choice: Choice) -> tuple[float, list[float], list[float]]:
    """The loss, and its derivatives by every l and by every entropy, in the order of rows and tokens."""
    total, by_logprob, by_entropy = 0.0, [], []
    for row in rows:
        for token in row.tokens:
            if not token.is_usable:
                by_logprob.append(0.0)
                by_entropy.append(0.0)
                continue
            factor = correction(row, token, choice)
            value, slope = surrogate(row, token, choice)
            value, slope = factor * value, factor * slope
            if choice.kl:
                kl_value, kl_slope = kl(token, choice)
                value, slope = value + KL_CTL * kl_value, slope + KL_CTL * kl_slope
            total += row.weight * (value - choice.bonus * token.entropy)
            by_logprob.append(row.weight * slope)
            by_entropy.append(-row.weight * choice.bonus)
    return total, by_logprob, by_entropy

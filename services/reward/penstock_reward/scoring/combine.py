"""From the outcomes of reward functions to one score: a pure weighted sum with a third state.

Owns the rule. Invariants: a failed component makes the full score failed, never 0 and never a partial sum, and the
reason names the function; no score is larger than `max_magnitude`, since the trainer squares rewards: a finite one can
be infinite there; the value that each function gave travels along, also if another failed. No I/O, logging, metrics or
config.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum, inf

from penstock.contracts import Score
from penstock_reward.processes.messages import FailureKind, Outcome


@dataclass(frozen=True)
class Verdict:
    """One completion's score, and the kinds of failure behind it (empty if there is a value)."""

    score: Score
    kinds: frozenset[FailureKind] = frozenset()


def failed(kind: FailureKind, reason: str, values: tuple[float | None, ...] = ()) -> Verdict:
    """A score that has no value."""
    return Verdict(Score(None, reason, values), frozenset({kind}))


def combine(
    weights: Mapping[str, float],
    outcomes: Mapping[str, Outcome],
    max_magnitude: float,
    gates: Mapping[str, float] | None = None,
) -> Verdict:
    """sum(weight * value) over the functions of `weights`; failed if any of them failed. Each needs an outcome.

    gates: least values of some functions. If one of them gives less, the sum is over the functions with a gate alone.
    """
    given = _values(weights, outcomes)
    failures = [(name, outcomes[name]) for name in weights if outcomes[name].value is None]
    if failures:
        kinds = frozenset(outcome.kind for _, outcome in failures if outcome.kind is not None)
        reason = "; ".join(f"{name}: {outcome.reason}" for name, outcome in failures)
        return Verdict(Score(None, reason, given), kinds)
    values = {name: value for name in weights if (value := outcomes[name].value) is not None}
    gates = {name: least for name, least in (gates or {}).items() if name in values}
    counted = weights if all(values[name] >= least for name, least in gates.items()) else gates
    terms = [weights[name] * values[name] for name in counted]
    try:
        total = fsum(terms)
    except (OverflowError, ValueError):  # the sum, or two terms of opposite signs, are beyond what a float holds
        total = inf
    if abs(total) > max_magnitude:
        shown = ", ".join(f"{name} {outcomes[name].value:g} * {weight:g}" for name, weight in weights.items())
        return failed(
            "too_large",
            f"the score is {total:g} ({shown}); expected at most {max_magnitude:g} either way: scale the function or "
            "its weight in reward.functions, or raise reward.max_magnitude",
            given,
        )
    return Verdict(Score(total, values=given))


def _values(weights: Mapping[str, float], outcomes: Mapping[str, Outcome]) -> tuple[float | None, ...]:
    """What each function gave; none if that of the only one is the score."""
    if list(weights.values()) == [1.0]:
        return ()
    return tuple(outcomes[name].value for name in weights)

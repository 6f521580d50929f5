"""Probe tokens and what the weights of a version say of them: how a server shows that it serves those weights.

Owns the comparison. The trainer computes the log-probabilities from the weights that it stages; they travel with the
version, and the rollout service asks its engine for the same tokens after every load. Invariant: what is compared was
computed by two programs from one set of weights, so it differs by the rounding of their arithmetic alone, which is what
the tolerance allows for.
"""

from collections.abc import Sequence

from penstock.contracts.groups import Contract
from penstock.errors import WeightsMismatchError


class Canary(Contract, frozen=True):
    """token_ids: N probe tokens. logprobs: of all but the first, in nats, at temperature 1.

    tolerance: the largest mean absolute difference that rounding explains, in nats.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tolerance: float

    def __post_init__(self) -> None:
        if len(self.token_ids) < 2 or len(self.logprobs) != len(self.token_ids) - 1:
            raise ValueError(
                f"{len(self.token_ids)} probe tokens with {len(self.logprobs)} log-probabilities: expected at least 2, "
                "and one less"
            )

    def check(self, seen: Sequence[float]) -> float:
        """The mean absolute difference to what a server answers; WeightsMismatchError when it is too large."""
        differences = [abs(a - b) for a, b in zip(seen, self.logprobs, strict=True)]
        mean = sum(differences) / len(differences)
        if not mean <= self.tolerance:  # a nan differs too
            raise WeightsMismatchError(
                f"the engine's log-probabilities of {len(self.token_ids)} probe tokens differ from the trainer's by "
                f"{mean:.2g} nats on average: expected at most {self.tolerance:g} (weights.canary_tolerance); it does "
                "not serve the weights that were announced"
            )
        return mean

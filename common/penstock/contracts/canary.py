"""The canary: tokens whose log-probabilities a server must reproduce, to verify that it serves a version's weights.

Owns the comparison. The trainer computes the log-probabilities from the weights that it stages; they travel with the
version, and the rollout service requests those of the same tokens from its engine after every load. Invariant: two
programs compute the compared values from one set of weights, so they differ only by the rounding of their arithmetic,
and the tolerance allows for that.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec

from penstock.contracts.wire import Contract
from penstock.errors import WeightsMismatchError


class Canary(Contract, frozen=True):
    """token_ids: N canary tokens. logprobs: of all but the first, in nats, at temperature 1.

    tolerance: the largest mean absolute difference that rounding explains, in nats.
    """

    token_ids: tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**31)], ...]
    logprobs: tuple[float, ...]
    tolerance: Annotated[float, msgspec.Meta(ge=0)]

    def __post_init__(self) -> None:
        if len(self.token_ids) < 2 or len(self.logprobs) != len(self.token_ids) - 1:
            raise ValueError(
                f"{len(self.token_ids)} canary tokens with {len(self.logprobs)} log-probabilities: expected at least "
                "2, and one less"
            )

    def check(self, seen: Sequence[float]) -> float:
        """The mean absolute difference to a server's log-probabilities; WeightsMismatchError if it is too large."""
        differences = [abs(a - b) for a, b in zip(seen, self.logprobs, strict=True)]
        mean = sum(differences) / len(differences)
        if not mean <= self.tolerance:  # a nan differs too
            raise WeightsMismatchError(
                f"the engine's log-probabilities of {len(self.token_ids)} canary tokens differ from the trainer's by "
                f"{mean:.2g} nats on average: expected at most {self.tolerance:g} (weights.canary_tolerance); it does "
                "not serve the weights that were announced"
            )
        return mean

"""When a canary reports that other weights are served."""

import math

import pytest

from penstock.contracts.canary import Canary
from penstock.errors import WeightsMismatchError

CANARY = Canary((1, 2, 3), (-1.0, -2.0), tolerance=0.1)


def test_rounding_passes_and_its_size_is_told() -> None:
    assert CANARY.check((-1.05, -1.9)) == pytest.approx(0.075)


@pytest.mark.parametrize("seen", [(-1.0, -2.3), (-3.0, -2.0), (math.nan, -2.0), (-1.0, -math.inf)])
def test_other_weights_are_named_with_the_key(seen: tuple[float, ...]) -> None:
    with pytest.raises(WeightsMismatchError, match=r"expected at most 0\.1 \(weights\.canary_tolerance\)"):
        CANARY.check(seen)


def test_it_needs_one_logprob_less_than_tokens() -> None:
    for token_ids, logprobs in [((1,), ()), ((1, 2), ()), ((1, 2), (-1.0, -1.0))]:
        with pytest.raises(ValueError, match="one less"):
            Canary(token_ids, logprobs, 0.1)

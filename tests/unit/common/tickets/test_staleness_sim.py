"""The simulation of both orders: properties that hold in every case, on a short run."""

from itertools import pairwise

import pytest

from benchmarks.staleness_sim import LENGTHS, ORDERS, STALENESS, Order, Result, Simulation, batch_for

NUM_STEPS = 60


def simulated(lengths: str, order: Order, max_staleness: int) -> Result:
    return Simulation(LENGTHS[lengths], order, max_staleness, seed=1, num_steps=NUM_STEPS).run()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("max_staleness", STALENESS)
def test_no_token_is_trained_too_late_and_only_ready_order_loses_any(lengths: str, max_staleness: int) -> None:
    ticket, drop, mask = (simulated(lengths, order, max_staleness) for order in ORDERS)
    for result in (ticket, drop, mask):
        assert max(result.staleness) <= max_staleness
        assert 0 <= result.busy <= 32 * result.seconds
    assert (ticket.dropped, ticket.masked_tokens, mask.dropped, drop.masked_tokens) == (0, 0.0, 0, 0.0)
    assert ticket.bias == pytest.approx(1, abs=0.15)  # the groups still there at the end
    if not max_staleness:
        assert ticket == drop == mask


def test_more_staleness_is_never_slower_in_ticket_order() -> None:
    seconds = [simulated("exponential", "ticket", max_staleness).seconds for max_staleness in STALENESS]
    assert all(later < earlier for earlier, later in pairwise(seconds))


def test_it_is_seeded() -> None:
    assert simulated("pareto", "drop", 2) == simulated("pareto", "drop", 2)


@pytest.mark.parametrize(
    ("lengths", "order", "max_staleness", "dropped", "seconds", "masked"),
    [("pareto", "drop", 2, 164, 75.229738818, 0.0), ("exponential", "mask", 1, 0, 105.505247329, 607.167109)],
)
def test_a_small_case_has_the_figures_that_it_always_had(
    lengths: str, order: Order, max_staleness: int, dropped: int, seconds: float, masked: float
) -> None:
    """So that a change for large cases cannot change what docs/staleness.md shows of small ones."""
    result = simulated(lengths, order, max_staleness)
    assert (result.steps, result.dropped, result.trained) == (51, dropped, 51 * 16)
    assert (result.seconds, result.masked_tokens) == pytest.approx((seconds, masked), rel=1e-6)


def test_a_larger_case_keeps_the_rules_and_scales() -> None:
    size = batch_for(num_servers=20, num_places=32)
    assert size == 40
    large = Simulation(LENGTHS["constant"], "ticket", 1, seed=1, num_steps=NUM_STEPS, batch_size=size).run()
    small = simulated("constant", "ticket", 1)
    assert (large.trained, large.staleness) == (small.trained * 40 // 16, {1: small.staleness[1] * 40 // 16})
    assert large.seconds == pytest.approx(small.seconds)
    with pytest.raises(ValueError, match="expected 16 places or more in all"):
        batch_for(num_servers=1, num_places=15)

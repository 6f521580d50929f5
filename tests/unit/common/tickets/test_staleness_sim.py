"""The simulation of both orders: properties that hold in every case, on a short run."""

from itertools import pairwise

import pytest

from benchmarks.staleness_sim import LENGTHS, ORDERS, STALENESS, Order, Result, Simulation

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

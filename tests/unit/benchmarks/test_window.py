"""The simulated window of tickets: what holds in every case, on short runs, and the signs that would move a bound."""

import random
from dataclasses import replace

import pytest

from benchmarks.window.controller import SIGNS, Controller
from benchmarks.window.lengths import CASES, GROUP_SIZE
from benchmarks.window.server import SLOTS, Server
from benchmarks.window.signs import chance, correlation, ranks
from benchmarks.window.simulation import BATCH_SIZE, ORDERS, Case, Result, Simulation
from benchmarks.window.study import Study

NUM_STEPS = 20
PAGE_SIGNS = SIGNS["as in baselines.md"]
GOOD, BAD = (0.9, 0.01), (0.1, 0.9)  # effective sample size and KL


def run(
    bound: int | Controller, *, num_servers: int = 8, order: int = 0, lengths: str = "a few prompts always long"
) -> Result:
    case = Case(CASES[lengths], num_servers, 1.0, ORDERS[order], num_steps=NUM_STEPS)
    return Simulation(case, bound, lambda lag, rng: BAD if lag > 2.5 else GOOD).run()


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("num_servers", [8, 64])
def test_an_order_changes_no_batch(num_servers: int, bound: int) -> None:
    results = [run(bound, num_servers=num_servers, order=index) for index in range(len(ORDERS))]
    in_order = [list(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)) for step in range(NUM_STEPS)]
    assert all(each.batches == in_order for each in results)


def test_an_order_only_matters_while_tickets_wait_for_a_slot() -> None:
    wide, narrow = ([run(0, num_servers=servers, order=index).rate for index in (0, 2)] for servers in (64, 8))
    assert wide[0] == wide[1]
    assert narrow[1] > narrow[0]


def test_a_bound_that_servers_cannot_fill_costs_no_lag_unless_far_tickets_start_first() -> None:
    case = Case(CASES["lognormal, half by prompt"], 8, 2.0, num_steps=NUM_STEPS)
    enough, more = (Simulation(case, bound).run() for bound in (4, 8))
    assert (more.rate, more.lag) == pytest.approx((enough.rate, enough.lag), rel=0.02)
    longest = Simulation(replace(case, order="longest"), 8).run()
    assert longest.lag > more.lag + 1


def test_expectations_of_other_prompts_do_not_pass_for_known_ones() -> None:
    known, noise = CASES["lognormal, half by prompt"], CASES["half by prompt, expected is noise"]
    drawn = [(known.draw(number, 0), noise.draw(number, 0)) for number in range(200)]
    assert all(one[0] == other[0] for one, other in drawn)
    means = [sum(one[0]) / GROUP_SIZE for one, _ in drawn]
    assert correlation([(means, [one[1] for one, _ in drawn])]) > 0.5
    assert abs(correlation([(means, [other[1] for _, other in drawn])])) < 0.3


def test_a_server_is_the_faster_the_emptier_it_is() -> None:
    server = Server()
    for ticket in range(SLOTS):
        server.add(ticket, [1.0] * GROUP_SIZE)
    assert server.next_end == pytest.approx(1.0)
    while server.next_end is not None and server.next_end == pytest.approx(1.0):
        server.advance(1.0)
        server.pop()
    assert server.next_end is None
    server.add(SLOTS, [1.0])
    assert server.next_end == pytest.approx(1.0 + (1 + 1 / (SLOTS * GROUP_SIZE)) / 2)


def test_a_bound_rises_while_the_trainer_waits_and_falls_by_the_signs() -> None:
    moved = run(Controller(PAGE_SIGNS, first=0, largest=8), num_servers=64)
    assert max(moved.bounds) > 0
    controller = Controller(PAGE_SIGNS, first=4, largest=8)
    for _ in range(100):
        controller.step(0.5, *BAD)
    assert controller.bound == 0
    for _ in range(100):
        controller.step(0.0, *GOOD)
    assert controller.bound == 0, "it raises a bound for which nothing waits"
    for _ in range(100):
        controller.step(0.5, *GOOD)
    assert controller.bound == 8


def test_signs_come_from_the_measured_steps_and_get_worse_with_lag() -> None:
    study = Study("ppo")
    sizes = [study.mean_size([lag]) for lag in (0, 0.5, 1, 3, 8, 20)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == sizes[-2]
    assert study.allows([1], PAGE_SIGNS)
    assert not study.allows([8], PAGE_SIGNS), "its KL is above 0.15, though its effective sample size is not below 0.4"
    rng = random.Random(0)
    mean = sum(study.sample(3, rng)[0] for _ in range(4000)) / 4000
    assert mean == pytest.approx(study.mean_size([3]), abs=0.032)  # 4 standard errors of values in 0..1 are 0.032


def test_correlation_is_within_strata_only() -> None:
    """Strata that differ as a whole, in a way that would give a correlation of nearly 1 over all together."""
    rising: tuple[list[float], list[float]] = ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    falling: tuple[list[float], list[float]] = ([11, 12, 13, 14, 15], [15, 14, 13, 12, 11])
    assert correlation([rising, falling]) == pytest.approx(0)
    assert correlation([rising]) == pytest.approx(1)
    assert chance([rising, rising], num_permutations=500) < 0.05 < chance([rising, falling], num_permutations=500)
    assert ranks([2.0, 1.0, 2.0, 5.0]) == [1.5, 0.0, 1.5, 3.0]


def test_it_is_seeded() -> None:
    case = Case(CASES["lognormal, half by prompt"], 8, 1.0, num_steps=NUM_STEPS)
    assert Simulation(case, 2).run() == Simulation(case, 2).run()
    assert Simulation(case, 2).run() != Simulation(replace(case, seed=1), 2).run()

"""Draws by success rates: against the definition, whatever order things happen in, and over restarts."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from penstock.config import Config, CurriculumSection
from penstock.contracts.ledger import Outcome, StepRecord
from penstock.errors import DataError
from penstock.seeds import sampling_seed
from penstock.tickets import TicketLimits
from penstock_trainer.data.drawing.curriculum import Curriculum
from penstock_trainer.data.drawing.draw_order import DrawnSet, DrawOrder
from penstock_trainer.data.drawing.weight_tree import WeightTree
from tests.unit.trainer.data.drawing.curriculum_reference import OutcomeOf, SimulatedRun, reference_draw

SETS = (DrawnSet("easy", 5, 1.0), DrawnSet("hard", 11, 2.0))
BATCH = 3
FAILURE = CurriculumSection(priority="failure")


def outcome_of(dropped_share: float) -> OutcomeOf:
    """Prompt p of 16 succeeds more rarely the higher p is; the same ticket and prompt always come to the same."""

    def of(number: int, prompt: int) -> tuple[int, bool]:
        value = sampling_seed(prompt, number, 0) / 2**31
        successes = sum(sampling_seed(prompt, number, n) / 2**31 > prompt / 16 for n in range(4))
        return successes, value < dropped_share

    return of


def simulated(
    section: CurriculumSection, chance: int, *, drops: float = 0.2, restarts: float = 0.0, staleness: int = 1
) -> SimulatedRun:
    limits = TicketLimits(BATCH, (staleness + 1) * BATCH, 64, delay=section.delay_steps * BATCH)
    order = DrawOrder(3, SETS)
    run = SimulatedRun(order, section, 3, limits, outcome_of(drops), Random(chance), restarts)
    run.run()
    return run


@pytest.mark.parametrize("priority", ["failure", "learnability"])
@pytest.mark.parametrize(("uniform_share", "decay", "delay_steps"), [(0.0, 1.0, 1), (0.3, 0.5, 2), (1.0, 0.9, 1)])
def test_each_draw_is_that_of_the_definition(
    priority: str, uniform_share: float, decay: float, delay_steps: int
) -> None:
    section = CurriculumSection.model_validate(
        {"priority": priority, "uniform_share": uniform_share, "decay": decay, "delay_steps": delay_steps}
    )
    run = simulated(section, 1)
    assert len(run.steps) > 12
    assert len(run.drops) > 5
    for number in run.drawn:
        expected = reference_draw(number, run.order, section, BATCH, run.steps, run.drops, run.drawn, 3)
        assert run.drawn[number] == expected, f"ticket {number}"


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.2, 0.6]), st.sampled_from([0, 1, 2]))
def test_neither_time_nor_kills_change_a_draw(chance: int, drops: float, staleness: int) -> None:
    """However groups arrive, versions are announced and trainers die: same tickets, prompts, steps and drops."""
    section = CurriculumSection(priority="failure", delay_steps=max(1, staleness))
    calm = simulated(section, 0, drops=drops, staleness=staleness)
    wild = simulated(section, chance, drops=drops, staleness=staleness, restarts=0.15)
    assert wild.num_lives > 1
    assert (wild.drawn, wild.steps, wild.drops) == (calm.drawn, calm.steps, calm.drops)


def test_without_drops_no_credit_stays_unused() -> None:
    run = simulated(FAILURE, 5, drops=0.0)
    assert run.most_outstanding == 2 * BATCH
    assert [step.tickets for step in run.steps[:2]] == [(0, 1, 2), (3, 4, 5)]


def many_draws(section: CurriculumSection, rates: dict[int, float]) -> Counter[int]:
    """Draws of one set of 8 prompts by a curriculum that has seen each of `rates` often; one draw for each count."""
    order, found = DrawOrder(1, [DrawnSet("", 8)]), Counter[int]()
    for seed in range(3000):
        curriculum = Curriculum(order, seed, section, 1)
        outcomes = tuple(Outcome(prompt, round(rate * 1000), 1000) for prompt, rate in rates.items())
        curriculum.committed(StepRecord(0, tuple(range(len(rates))), "f", "d", outcomes=outcomes))
        found[curriculum.row(len(rates) + 1)] += 1  # the first draw that counts the step
    return found


@pytest.mark.parametrize(
    ("priority", "expected"),
    [("failure", [1.0, 0.75, 0.5, 0.0]), ("learnability", [0.0, 0.1875, 0.25, 0.0])],
)
def test_the_shares_are_those_of_the_published_weights(priority: str, expected: list[float]) -> None:
    """Four prompts with known rates, four that were never drawn (rate 1/2), and a tenth of uniform draws."""
    section = CurriculumSection.model_validate({"priority": priority, "uniform_share": 0.1, "decay": 1.0})
    found = many_draws(section, {0: 0.0, 1: 0.25, 2: 0.5, 3: 1.0})
    unseen = 0.5 if priority == "failure" else 0.25
    weights = [*expected, *[unseen] * 4]
    for prompt, weight in enumerate(weights):
        share = 0.1 / 8 + 0.9 * weight / sum(weights)
        deviation = (share * (1 - share) / 3000) ** 0.5
        assert abs(found[prompt] / 3000 - share) < 5 * deviation + 0.002, f"prompt {prompt}"


def test_an_old_outcome_counts_less_and_one_without_rewards_not_at_all() -> None:
    curriculum = Curriculum(DrawOrder(1, [DrawnSet("", 4)]), 1, FAILURE.model_copy(update={"decay": 0.5}), 1)
    for step, outcome in enumerate([Outcome(0, 4, 4), Outcome(1, 0, 0), Outcome(0, 0, 4)]):
        curriculum.committed(StepRecord(step, (step,), "f", "d", outcomes=(outcome,)))
    curriculum.row(50)
    assert curriculum.success_rate(0) == pytest.approx((2 + 1) / (2 + 4 + 2))
    assert curriculum.success_rate(1) == 0.5


def test_a_ledger_that_does_not_fit_the_draws_is_refused() -> None:
    run = simulated(FAILURE, 1)
    step = run.steps[4]
    other = step.outcomes[0]._replace(prompt=(step.outcomes[0].prompt + 1) % 16)
    wrong = StepRecord(4, step.tickets, "f", "d", outcomes=(other, *step.outcomes[1:]))
    fresh = Curriculum(run.order, 3, FAILURE, BATCH)
    with pytest.raises(DataError, match=rf"ticket {step.tickets[0]} draws prompt \d+ .* records that it drew"):
        fresh.restore([*run.steps[:4], wrong, *run.steps[5:]], run.drops, 40)
    without = StepRecord(4, step.tickets, "f", "d")
    with pytest.raises(DataError, match="step 5 has 0 outcomes of its 3 tickets"):
        Curriculum(run.order, 3, FAILURE, BATCH).restore([*run.steps[:4], without], run.drops, 40)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.lists(st.tuples(st.integers(), st.integers(0, 9))))
def test_a_tree_of_weights_finds_what_a_list_would(weights: list[int], changes: list[tuple[int, int]]) -> None:
    tree, plain = WeightTree(weights), list(weights)
    for index, weight in changes:
        tree.set(index % len(plain), weight)
        plain[index % len(plain)] = weight
    assert tree.total == sum(plain)
    assert [tree[index] for index in range(len(plain))] == plain
    assert [tree.find(place) for place in range(tree.total)] == [n for n, w in enumerate(plain) for _ in range(w)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"curriculum": {"decay": 0.9}}}, "priority is none, and other keys .* are set"),
        ({"data": {"shuffle": False, "curriculum": {"priority": "failure"}}}, "data.shuffle is false with"),
        (
            {"data": {"curriculum": {"priority": "failure"}}, "staleness": {"order": "ready"}},
            "data.curriculum.priority is failure with staleness.order ready",
        ),
        (
            {"data": {"curriculum": {"priority": "failure"}}, "staleness": {"max_staleness": 2}},
            "data.curriculum.delay_steps is 1 and staleness.max_staleness 2",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(sections: dict[str, dict[str, object]], message: str) -> None:
    document = {"actor": {"path": "m"}, **sections, "data": {"train": {"path": "d"}, **sections.get("data", {})}}
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(document)

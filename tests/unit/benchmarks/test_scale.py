"""The run with many services: its figures, its engine, and that its verdict can fail (docs/scale.md)."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.chaos.reader import Findings
from benchmarks.scale.costs import Moment, Window, growth, window
from benchmarks.scale.engine import LetterEngine
from benchmarks.scale.plan import GROUP_SIZE, ScalePlan
from benchmarks.scale.verdict import Verdict
from penstock.contracts import Sampling
from penstock_rollout.engine.types import CompletionRequest

MB = 2**20
FLAT = [(float(at), 400.0 * MB) for at in range(30)]
GOOD = Verdict(
    plan=ScalePlan(),
    found=Findings(issued=1600, trained=600, on_their_way=1000, steps=3, staleness_max=1),
    few=Window(16, 10.0, 2, 400, {"queue": 500.0}),
    many=Window(1000, 10.0, 2, 400, {"queue": 600.0}),
    disturbed=Window(1000, 60.0, 10, 2000, {"queue": 900.0}),
    memory={"trainer": FLAT, "queue, used": FLAT},
    num_joined=1000,
    num_killed=0,
    num_left=0,
    num_versions=4,
    num_refused=0,
    num_late=0,
)


def line(bytes_per_second: float) -> list[tuple[float, float]]:
    return [(at, value + bytes_per_second * at) for at, value in FLAT]


def test_growth_is_the_slope_after_the_warm_up() -> None:
    warm = [(float(at), 100.0 * MB * at) for at in range(5)]
    later = [(5 + at, value) for at, value in line(0.1 * MB)[:20]]
    found = growth([*warm, *later])
    assert found is not None
    assert found.bytes_per_hour == pytest.approx(360 * MB)
    assert found.is_flat
    assert growth(FLAT[:4]) is None


@pytest.mark.parametrize(
    ("bytes_per_second", "is_flat"), [(0.0, True), (-9 * MB, True), (0.5 * MB, True), (3 * MB, False)]
)
def test_memory_that_shrinks_or_grows_by_a_few_blocks_is_flat(bytes_per_second: float, is_flat: bool) -> None:
    found = growth(line(bytes_per_second))
    assert found is not None
    assert found.is_flat is is_flat


def test_a_window_counts_cpu_time_by_the_groups_that_were_trained() -> None:
    before, after = Moment(1.0, 100, 2, {"queue": 1.0}), Moment(5.0, 300, 4, {"queue": 1.5})
    found = window(16, before, after)
    assert (found.us_per_group, found.num_steps, found.groups_per_second) == ({"queue": 2500.0}, 2, 50.0)
    with pytest.raises(ValueError, match="raise --seconds"):
        window(16, before, before)


def test_the_load_is_the_same_with_any_number_of_services() -> None:
    plan = ScalePlan()
    for number in (plan.few, plan.many):
        assert number * plan.room_of(number) / GROUP_SIZE >= 2 * plan.most_outstanding
        assert plan.room_of(number) % GROUP_SIZE == 0


def test_a_verdict_names_what_is_wrong() -> None:
    assert (GOOD.broken_rules(), GOOD.missed_aims()) == ([], [])
    bad = replace(GOOD.found, lost=1, trained_twice=2, staleness_max=2, dropped={"poison": 3}, problems=["a problem"])
    assert replace(GOOD, found=bad, num_versions=2).broken_rules() == [
        "1 tickets were lost",
        "2 tickets ended twice",
        "a token of staleness 2 was trained",
        "{'poison': 3} were dropped",
        "2 versions for 3 steps",
        "a problem",
    ]
    dear = replace(GOOD, many=replace(GOOD.many, us_per_group={"queue": 700.0}))
    assert dear.missed_aims() == [
        "a group costs the queue 1.40 times as much with 1000 services as with 16; expected 1.3"
    ]
    grown = replace(GOOD, memory={"trainer": line(3 * MB), "queue, used": FLAT[:3]})
    assert [each.partition(":")[0] for each in grown.missed_aims()] == [
        "memory of trainer grew by 12.4 %",
        "memory of queue, used",
    ]


def test_a_verdict_is_shown_and_written(tmp_path: Path) -> None:
    assert GOOD.lines()[-1] == "us of the queue a group, 1000 services over 16: 1.20"
    GOOD.write(tmp_path / "verdict.json")
    assert '"broken": []' in (tmp_path / "verdict.json").read_text()


async def completed(engine: LetterEngine, seeds: Sequence[int]) -> list[list[tuple[str, int, int]]]:
    answers = await engine.complete([CompletionRequest((3, 4), seed, 40) for seed in seeds], Sampling(1.0, 40, ()))
    assert all(len(each.token_ids) == len(each.logprobs) == 40 for each in answers)
    return [[(span.weight_version, span.start, span.end) for span in each.spans] for each in answers]


async def test_a_token_is_by_the_version_that_was_loaded_when_it_was_sampled() -> None:
    now = 100.0
    engine = LetterEngine(mean_seconds=0.4, clock=lambda: now)
    await engine.load(Path("/weights"), "1-aa", 1.0)
    assert await completed(engine, (5,)) == [[("1-aa", 0, 40)]]
    running = asyncio.create_task(completed(engine, (5, 6)))
    await asyncio.sleep(0)
    now += 0.1  # before the end of the shortest completion
    await engine.load(Path("/weights"), "2-bb", 1.0)
    for spans in await running:
        (first, start, cut), *rest = spans
        assert (first, start) == ("1-aa", 0)
        assert rest == [("2-bb", cut, 40)]
    assert await completed(engine, (5,)) == [[("2-bb", 0, 40)]]


async def test_what_is_aborted_has_the_tokens_so_far() -> None:
    engine = LetterEngine(mean_seconds=3600.0)
    await engine.load(Path("/weights"), "1-aa", 1.0)
    running = asyncio.create_task(engine.complete([CompletionRequest((3,), 1, 8)], Sampling(1.0, 8, ())))
    await asyncio.sleep(0)
    await engine.abort_all()
    [answer] = await running
    assert (answer.finish_reason, list(answer.token_ids), answer.spans) == ("abort", [], ())

"""Groups that run while weights change: cut and continued, or lost with an engine that failed its canary."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from penstock.contracts import Completion
from penstock.errors import WeightsMismatchError
from tests.unit.rollout.producer_setup import Bench, G, producer_bench, ticket


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with producer_bench(tmp_path) as bench:
        yield bench


def versions(completion: Completion) -> list[int]:
    return [span.policy.number for span in completion.spans for _ in range(span.end - span.start)]


@pytest.mark.parametrize("reports_spans", [True, False])
async def test_what_updates_cut_goes_on_where_it_was(bench: Bench, reports_spans: bool) -> None:
    bench.use(pause_mode="abort")
    bench.queue.put(ticket(0, tokens=12))
    bench.announce(1)
    await bench.until(lambda: bench.queue.published)
    bench.fake.reports_spans, bench.fake.holds_at = reports_spans, 3  # of 12 tokens
    bench.queue.put(ticket(0, tokens=12))
    for turn, version in enumerate((2, 3), start=1):
        await bench.until(partial(lambda count: bench.fake.num_held == count, turn * G))
        bench.announce(version)
        assert bench.queue.announced is not None
        await bench.weights.update(bench.queue.announced)
    bench.fake.holds_at = -1
    await bench.until(lambda: len(bench.queue.published) == 2)
    uncut, cut = bench.queue.published
    assert bench.queue.returned == []
    for expected, completion in zip(uncut.completions, cut.completions, strict=True):
        assert completion.token_ids == expected.token_ids
        assert completion.text == expected.text
        assert completion.finish_reason == "length"
        made_by = versions(completion)
        assert (len(made_by), sorted(made_by), set(made_by)) == (12, made_by, {1, 2, 3})


async def test_an_engine_without_spans_needs_the_mode_that_empties_it(bench: Bench) -> None:
    bench.fake.reports_spans = False
    bench.queue.put(ticket(0))
    bench.announce(1)
    await bench.until(lambda: len(bench.queue.returned) == 3)
    assert bench.queue.published == []
    assert "weights.pause_mode abort" in bench.queue.reasons[0]


async def test_nothing_that_a_failed_canary_could_have_made_is_published(bench: Bench) -> None:
    """The engine says that it has loaded version 2 and goes on with version 1: what it answers then is lost."""
    bench.fake.holds_at = 3  # of 20 tokens
    bench.announce(1, canary=True)
    bench.queue.put(ticket(0, tokens=20))
    await bench.until(lambda: bench.fake.num_held == G)
    bench.fake.sticks_to = "1-"
    bench.fake.may_probe.clear()
    bench.announce(2, canary=True)
    assert bench.queue.announced is not None
    updating = asyncio.create_task(bench.weights.update(bench.queue.announced))
    await bench.until(lambda: "/continue_generation" in bench.fake.paths()[-2:])
    bench.fake.holds_at = -1  # the group ends while the canary is still being asked
    bench.queue.put(ticket(1))
    await bench.until(lambda: bench.fake.num_running == 0)
    assert bench.queue.published == []
    bench.fake.may_probe.set()
    with pytest.raises(WeightsMismatchError):
        await updating
    assert bench.queue.taken == ["0"]
    bench.fake.sticks_to = ""
    await bench.until(lambda: len(bench.queue.published) == 2)
    assert bench.queue.returned == [("0", "free")]  # an engine that ends for its weights is no death of a ticket's
    assert bench.server.num_starts == 2
    for group in bench.queue.published:
        assert {version for each in group.completions for version in versions(each)} == {2}

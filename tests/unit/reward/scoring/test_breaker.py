"""Circuit breakers: what opens one, what waits for it and in which order."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from penstock.broker import Delivery
from penstock.config import RewardSection
from penstock.contracts.stored_groups import ScoredHeader, Taught
from penstock.errors import RewardUnavailableError
from penstock_reward.metrics import RewardMetrics
from penstock_reward.processes.messages import Call, Outcome
from penstock_reward.score_groups import score_groups
from penstock_reward.scoring.breaker import AnsweredCall, Breaker, Breakers
from penstock_reward.scoring.permits import Permits
from penstock_reward.scoring.scoring import Scoring
from tests.patience import ANSWER_SECONDS
from tests.unit.reward.scoring.test_scoring import OK, FakeConsumer, FakeRunner, group

DOWN = Outcome(None, 0.1, "transient", "ConnectionError: refused\nby peer")
WRONG = Outcome(None, 0.1, "exception", "TypeError: no")
COOLDOWN_SECONDS = 0.01
ANSWERED = AnsweredCall("p", "c", "a", {}, 0.1)


def fail(breaker: Breaker, reason: str = "down") -> None:
    breaker.failed(reason, 0, declared=True)


class Server(FakeRunner):
    """A server of functions: those in `down` fail now; each call is passed to `on_call`."""

    def __init__(self, *down: str) -> None:
        super().__init__(lambda call, attempt: DOWN if call.function in self.down else OK)
        self.down = set(down)
        self.completions: list[tuple[str, str]] = []
        self.on_call: Callable[[str], None] = lambda completion: None

    async def run(
        self,
        prompt: str,
        completions: Sequence[str],
        answer: str,
        metadata: dict[str, Any],
        calls: Sequence[Call],
        *,
        on_outcome: Callable[[Call, Outcome], None],
        is_test: bool = False,
    ) -> list[Outcome]:
        await asyncio.sleep(0)
        for call in calls:
            self.completions.append((call.function, completions[call.completion]))
            self.on_call(completions[call.completion])
        return await super().run(prompt, completions, answer, metadata, calls, on_outcome=on_outcome, is_test=is_test)


class ServerScoring:
    """A scoring whose functions live on a fake server, and the sleeps of its retries."""

    def __init__(self, server: FakeRunner, **keys: Any) -> None:
        self.metrics = RewardMetrics()
        self.naps: list[float] = []
        section = {"breaker_failures": 3, "breaker_seconds": COOLDOWN_SECONDS, "max_attempts": 1, **keys}
        self.scoring = Scoring(RewardSection(**section), server, self.metrics, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        await asyncio.sleep(0)

    def open(self, function: str = "exact_match") -> float | None:
        return self.metrics.registry.get_sample_value("penstock_reward_breaker_open", {"function": function})


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(ANSWER_SECONDS):
        while not condition():  # noqa: ASYNC110 - conditions over several objects
            await asyncio.sleep(0.001)


async def test_failures_in_a_row_open_it_and_one_answer_starts_the_count_again() -> None:
    changes: list[tuple[str, bool]] = []
    breaker = Breakers(3, 60, lambda name, is_open: changes.append((name, is_open))).of("f")
    for _ in range(2):
        fail(breaker)
    assert str(breaker.state) == "closed"
    fail(breaker, "down\nagain")
    assert str(breaker.state) == "open"
    assert str(breaker) == "f (3 failures in a row, last: down again)"
    breaker.answered(ANSWERED)
    assert changes == [("f", True), ("f", False)]
    for _ in range(2):
        fail(breaker)
    assert not breaker.is_suspect
    fail(breaker)
    assert breaker.is_suspect  # still closed: a call that was answered before can show whether this is an outage
    assert str(breaker.state) == "closed"


async def test_before_any_answer_calls_that_hang_must_be_of_two_prompts() -> None:
    breaker = Breakers(3, 60, lambda name, is_open: None).of("f")
    for _ in range(20):
        breaker.failed("killed", 7, declared=False)
    assert str(breaker.state) == "closed"
    breaker.failed("killed", 8, declared=False)
    assert str(breaker.state) == "open"
    assert not breaker.is_suspect


def test_the_call_to_repeat_is_the_slowest_of_the_last_ones() -> None:
    breaker = Breakers(3, 60, lambda name, is_open: None).of("f")
    assert breaker.reference is None
    for completion, seconds in (("judged", 0.8), *[("", 0.0001)] * 5, ("judged too", 0.7)):
        breaker.answered(AnsweredCall("p", completion, "a", {}, seconds))
    assert breaker.reference is not None
    assert breaker.reference.completion == "judged"


async def test_a_wrong_function_opens_nothing() -> None:
    setup = ServerScoring(FakeRunner(lambda call, attempt: WRONG))
    for _ in range(5):
        await setup.scoring.score("p", ["a"], "a", "", {})
    assert setup.open() == 0


async def test_a_limit_of_0_never_opens() -> None:
    setup = ServerScoring(FakeRunner(lambda call, attempt: DOWN), breaker_failures=0)
    for _ in range(50):
        [verdict] = await setup.scoring.score("p", ["a"], "a", "", {})
        assert verdict.kinds == {"transient"}


async def test_requests_over_http_are_refused_while_it_is_open() -> None:
    setup = ServerScoring(Server("exact_match"), breaker_seconds=60)
    verdicts = await setup.scoring.score("p", ["a", "b", "c"], "a", "", {})
    assert [verdict.score.value for verdict in verdicts] == [None] * 3
    with pytest.raises(RewardUnavailableError, match=r"exact_match \(3 failures in a row, last: Connection"):
        await setup.scoring.score("p", ["a"], "a", "", {})
    [verdict] = await setup.scoring.score("p", ["a"], "a", "math", {})
    assert verdict.score.value == 1.0


async def test_only_one_probes_at_a_time_and_each_probe_is_another_groups() -> None:
    breaker = Breakers(1, COOLDOWN_SECONDS, lambda name, is_open: None).of("f")
    fail(breaker)
    probed: list[int] = []
    went_on: list[int] = []

    async def go(place: int) -> None:
        num_probes = 0
        while await breaker.admission(place, num_probes):
            num_probes += 1
            probed.append(place)
            await asyncio.sleep(0)
            if len(probed) == 7:
                breaker.answered(ANSWERED)
            else:
                fail(breaker)
            breaker.probe_ended()
        went_on.append(place)

    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as tasks:
        for place in (2, 0, 1):
            tasks.create_task(go(place))
    assert probed == [0, 1, 2, 0, 1, 2, 0]
    assert went_on == [0, 1, 2]


async def test_a_prober_that_is_cancelled_leaves_the_probe_to_another() -> None:
    tasks: list[asyncio.Task[bool]] = []

    def on_change(name: str, is_open: bool) -> None:
        if tasks:  # half open: the first group is chosen in this turn of the loop, and cancelled before it runs
            asyncio.get_running_loop().call_soon(tasks[0].cancel)

    breaker = Breakers(1, COOLDOWN_SECONDS, on_change).of("f")
    fail(breaker)
    tasks += [asyncio.create_task(breaker.admission(place, 0)) for place in (0, 1)]
    async with asyncio.timeout(ANSWER_SECONDS):
        assert await tasks[1] is True
    assert tasks[0].cancelled()


class Queue(FakeConsumer):
    """A queue that stays open, and the groups handed over, in order."""

    def __init__(self, *groups: Any) -> None:
        super().__init__(groups, asyncio.Event())
        self.order: list[str] = []

    async def wait(self, *, timeout_seconds: float) -> None:
        await asyncio.sleep(0.001)

    async def hand_over_and_take(
        self, delivery: Delivery, message: ScoredHeader | Taught, to: Any, *stages: Any
    ) -> tuple[bool, Delivery | None]:
        self.order.append(delivery.ticket_key)
        return await super().hand_over_and_take(delivery, message, to, *stages)

    async def give_back(self, delivery: Delivery, **keys: Any) -> None:
        self.held -= 1
        await super().give_back(delivery, **keys)


async def test_a_permit_is_handed_on_unless_a_parked_group_wants_it_or_too_many_are_parked() -> None:
    permits, waiting = Permits(1, max_parked=2), asyncio.Event()

    async def breakers_closed() -> None:
        await waiting.wait()

    permit = await permits.acquire()
    parked = asyncio.create_task(permit.release_while(breakers_closed()))
    await until(lambda: permits.num_parked == 1)
    other = await permits.acquire()
    assert not other.is_wanted
    waiting.set()
    await until(lambda: other.is_wanted)
    other.release()
    await parked
    assert not permit.is_wanted
    permits.parked(+2)
    assert permit.is_wanted


async def test_parked_groups_go_on_in_order_and_none_fails_by_the_outage() -> None:
    server = Server("exact_match")
    setup = ServerScoring(server)
    queue = Queue(*(group(number, ("7", "8")) for number in range(6)), *(group(n, reward="math") for n in (6, 7)))
    permits = Permits(1, max_parked=8)
    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as tasks:
        tasks.create_task(score_groups(queue, setup.scoring, setup.metrics, queue.stop, permits))
        await until(lambda: {"6", "7"} <= queue.handed_over.keys())  # another function's groups pass the parked ones
        assert setup.open() == 1
        assert setup.open("math") is None
        assert "failures in a row, last: " in setup.scoring.breakers.open_ones()["exact_match"]
        probes = len(server.rounds)
        await until(lambda: len(server.rounds) >= probes + 5)
        assert permits.num_parked >= 5
        server.down.clear()
        await until(lambda: len(queue.handed_over) == 8)
        queue.stop.set()
    scored = [queue.handed_over[str(number)] for number in range(8)]
    # The first group failed on its own, before the breaker opened in the second; no later one did.
    values = [[score.value for score in each.scores] for each in scored]
    assert values == [[None, None], *[[1.0, 1.0]] * 7]
    assert queue.order[0] == "0"
    assert queue.order[3:] == sorted(queue.order[3:])
    assert setup.open() == 0
    assert setup.scoring.breakers.open_ones() == {}
    assert permits.num_parked == 0


async def test_no_more_groups_are_parked_than_allowed_and_an_end_gives_them_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock_reward.score_groups.DRAIN_SECONDS", 0.05)
    server = Server("exact_match")
    setup = ServerScoring(server, breaker_failures=1)
    queue = Queue(*(group(number) for number in range(10)))
    permits = Permits(2, max_parked=3)
    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as tasks:
        tasks.create_task(score_groups(queue, setup.scoring, setup.metrics, queue.stop, permits))
        await until(lambda: permits.num_parked >= 3)
        probes = len(server.rounds)
        await until(lambda: len(server.rounds) > probes + 3)
        assert queue.held == queue.most_held <= 4  # 3 parked, and one that was being scored when the third parked
        assert not queue.handed_over
        queue.stop.set()
    assert sorted(queue.given_back) == sorted(map(str, range(queue.most_held)))
    assert len(queue.waiting) == 10 - queue.most_held


async def test_the_others_close_a_breaker_that_one_prompt_opened_before_anything_was_answered() -> None:
    """The function reports failures as `transient`, although the prompt alone causes them."""

    def rule(call: Call, attempt: int) -> Outcome:
        return DOWN if server.completions[-1][1].startswith("bad") else OK

    server = Server()
    server.rule = rule
    setup = ServerScoring(server, breaker_failures=2)
    queue = Queue(group(0, ("bad a", "bad b")), *(group(number, ("7",)) for number in range(1, 12)))
    async with asyncio.timeout(ANSWER_SECONDS), asyncio.TaskGroup() as tasks:
        tasks.create_task(score_groups(queue, setup.scoring, setup.metrics, queue.stop, Permits(1, max_parked=4)))
        await until(lambda: len(queue.handed_over) >= 11 and "0" in queue.handed_over)
        queue.stop.set()
    bad = queue.handed_over["0"]
    assert [score.value for score in bad.scores] == [None, None]

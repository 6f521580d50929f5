"""Which functions apply, retries, and the loop over the queue; with fakes for pool and queue."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from penstock.broker import Delivery, Stage
from penstock.config import RewardSection
from penstock.contracts import (
    Completion,
    Episode,
    EpisodeCounts,
    Node,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    Score,
    Ticket,
    VersionSpan,
    decode,
    encode,
    pack_float32,
    pack_int32,
)
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader, Stored, Taught, TextsPart, stored
from penstock.errors import RewardError
from penstock_reward.metrics import RewardMetrics
from penstock_reward.processes.messages import Call, Outcome
from penstock_reward.score_groups import score_groups
from penstock_reward.scoring.permits import Permits
from penstock_reward.scoring.scoring import Scoring
from tests.patience import ANSWER_SECONDS
from tests.unit.reward.teacher.teacher_setup import FakeTeacher, answering, serving, teacher_of

OK = Outcome(1.0, 0.01)
TIMEOUT = Outcome(None, 10.0, "timeout", "killed after 10 s")


class FakeRunner:
    """Answers calls by a rule; records them."""

    def __init__(self, rule: Callable[[Call, int], Outcome] = lambda call, attempt: OK) -> None:
        self.rule = rule
        self.rounds: list[list[Call]] = []

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
        self.rounds.append(list(calls))
        outcomes = [self.rule(call, len(self.rounds)) for call in calls]
        for call, outcome in zip(calls, outcomes, strict=True):
            on_outcome(call, outcome)
        return outcomes


def scoring(runner: FakeRunner, metrics: RewardMetrics | None = None, **keys: Any) -> Scoring:
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0)

    return Scoring(RewardSection(**keys), runner, metrics or RewardMetrics(), sleep=sleep)


async def test_the_runs_functions_are_summed_in_one_round() -> None:
    runner = FakeRunner()
    scorer = scoring(runner, functions={"exact_match": 1.0, "format_regex": 0.5, "math": 0.0})
    verdicts = await scorer.score("p", ["a", "b"], "a", "", {})
    assert [verdict.score.value for verdict in verdicts] == [1.5, 1.5]
    assert len(runner.rounds) == 1
    assert {call.function for call in runner.rounds[0]} == {"exact_match", "format_regex"}


async def test_a_row_may_name_its_own_function() -> None:
    runner = FakeRunner(lambda call, attempt: Outcome(0.25, 0.0))
    scorer = scoring(runner, functions={"exact_match": 2.0, "mine:f": 0.0})
    for reward in ("math", "mine:f", "exact_match"):
        [verdict] = await scorer.score("p", ["a"], "a", reward, {})
        assert verdict.score.value == 0.25
        assert runner.rounds[-1] == [Call(reward, 0)]


async def test_a_score_beyond_the_bound_is_a_failure_of_its_completion_alone() -> None:
    runner = FakeRunner(lambda call, attempt: Outcome(1e155 if call.completion == 0 else 1e5, 0.0))
    metrics = RewardMetrics()
    verdicts = await scoring(runner, metrics).score("p", ["a", "b"], "a", "", {})
    assert [verdict.score.value for verdict in verdicts] == [None, 1e5]
    assert verdicts[0].score.failure.startswith("the score is 1e+155 (exact_match 1e+155 * 1); expected at most 1e+06")
    assert metrics.registry.get_sample_value("penstock_reward_failures_total", {"reason": "too_large"}) == 1
    wider = await scoring(runner, max_magnitude=1e5).score("p", ["a", "b"], "a", "", {})
    assert [verdict.score.value for verdict in wider] == [None, 1e5]


async def test_an_unknown_reward_is_a_failure_and_calls_nothing() -> None:
    runner = FakeRunner()
    verdicts = await scoring(runner).score("p", ["a", "b"], "a", "os:system", {})
    assert [verdict.score.value for verdict in verdicts] == [None, None]
    assert verdicts[0].score.failure.startswith("unknown reward 'os:system'; expected one of exact_match")
    assert verdicts[0].kinds == {"unknown_reward"}
    assert not runner.rounds


async def test_weights_of_zero_need_a_reward_in_the_row() -> None:
    [verdict] = await scoring(FakeRunner(), functions={"exact_match": 0.0}).score("p", ["a"], "a", "", {})
    assert "every weight in reward.functions is 0" in verdict.score.failure


async def test_only_failed_calls_are_repeated_and_every_failure_is_counted() -> None:
    runner = FakeRunner(lambda call, attempt: TIMEOUT if call.completion == 1 and attempt < 3 else OK)
    metrics = RewardMetrics()
    scorer = scoring(runner, metrics, max_attempts=5, functions={"mine:f": 1.0})
    verdicts = await scorer.score("p", ["a", "b", "c"], "a", "", {})
    assert [verdict.score.value for verdict in verdicts] == [1.0, 1.0, 1.0]
    assert [[call.completion for call in calls] for calls in runner.rounds] == [[0, 1, 2], [1], [1]]
    assert metrics.registry.get_sample_value("penstock_reward_failures_total", {"reason": "timeout"}) == 2
    count = metrics.registry.get_sample_value("penstock_reward_score_duration_seconds_count", {"function": "mine:f"})
    assert count == 5


async def test_after_max_attempts_it_stays_failed() -> None:
    runner = FakeRunner(lambda call, attempt: TIMEOUT)
    [verdict] = await scoring(runner, max_attempts=2, functions={"mine:f": 1.0}).score("p", ["a"], "a", "", {})
    assert verdict.score.failure == "mine:f: killed after 10 s"
    assert len(runner.rounds) == 2


async def test_a_pure_function_that_timed_out_is_not_called_again() -> None:
    runner = FakeRunner(lambda call, attempt: TIMEOUT)
    scorer = scoring(runner, max_attempts=3, breaker_failures=2)
    for _ in range(5):
        verdicts = await scorer.score("p", ["a", "b"], "a", "", {})
        assert [verdict.score.failure for verdict in verdicts] == ["exact_match: killed after 10 s"] * 2
    assert len(runner.rounds) == 5
    assert scorer.breakers.open_ones() == {}


def group(number: int, texts: Sequence[str] = ("7", "8"), **ticket: Any) -> RolloutGroup:
    policy = PolicyIdentity(0, "0" * 16)
    fields: dict[str, Any] = {
        "purpose": "train",
        "number": number,
        "attempt": 0,
        "policy_version": 0,
        "prompt": "3+4=",
        "prompt_ids": pack_int32([1, 2]),
        "seeds": tuple(range(len(texts))),
        "sampling": Sampling(1.0, 4, (2,)),
        "answer": "7",
        "reward": "",
        "metadata": {},
        **ticket,
    }
    completions = tuple(
        Completion(pack_int32([5]), b"\x01", pack_float32([-0.5]), (VersionSpan(policy, 0, 1),), text, "stop")
        for text in texts
    )
    return RolloutGroup(Ticket(**fields), completions, "http://server", 1.0, 2.0)


def episodes(number: int, scores: Sequence[Score], **ticket: Any) -> RolloutGroup:
    """A group of episodes with these scores of their environment."""
    completions = group(number, ["7"] * len(scores), **ticket)
    fields = msgspec.structs.replace(completions.ticket, prompt_ids=b"", environment="my_envs:Guess")
    span = VersionSpan(PolicyIdentity(0, "0" * 16), 0, 1)
    nodes = (Node(-1, pack_int32([1])), Node(0, pack_int32([5]), pack_float32([-0.5]), (span,)))
    made = tuple(
        Episode(nodes if score.value is not None else (), score, "done" if not score.failure else "failure",
                EpisodeCounts(), 1.0, 2.0, text=f"transcript {index}")
        for index, score in enumerate(scores)
    )  # fmt: skip
    return RolloutGroup(fields, (), "http://agent", 1.0, 2.0, episodes=made)


class FakeConsumer:
    """The queue: deliveries to take, and the fate of each."""

    def __init__(self, messages: Sequence[RolloutGroup | bytes], stop: asyncio.Event) -> None:
        forms = [stored(each) if isinstance(each, RolloutGroup) else Stored(each) for each in messages]
        self.parts = {str(index): form.parts for index, form in enumerate(forms)}
        self.waiting = [
            Delivery(Stage.ROLLOUTS, f"{index}-0", str(index), 0, form.header, "", 0, 0, parts=str(index))
            for index, form in enumerate(forms)
        ]
        self.stop = stop
        self.handed_over: dict[str, ScoredHeader] = {}
        self.taught: dict[str, tuple[bytes, ...]] = {}
        self.reads: set[tuple[Part, ...]] = set()
        self.buried: dict[str, str] = {}
        self.given_back: list[str] = []
        self.held = 0
        self.most_held = 0
        self.followed = 0
        self.num_takes = 0
        self.takes_before_wait: list[int] = []
        self.expects_wakeup = False

    async def take(self, *stages: Stage, has_room: bool = False) -> Delivery | None:
        taken = self._next(*stages)
        self.num_takes += 1
        self.expects_wakeup = taken is None or (has_room and not self.waiting)
        return taken

    def _next(self, *stages: Stage) -> Delivery | None:
        assert set(stages) <= {Stage.ROLLOUTS}
        if not self.waiting or not stages:
            return None
        self.held += 1
        self.most_held = max(self.held, self.most_held)
        return self.waiting.pop(0)

    async def wait(self, *, timeout_seconds: float) -> None:
        self.takes_before_wait.append(self.num_takes)
        if not self.held:
            self.stop.set()
        await asyncio.sleep(0)

    async def read(self, deliveries: Sequence[Delivery], *parts: Part) -> list[dict[Part, bytes | None]]:
        self.reads.add(parts)
        return [{part: self.parts[each.parts].get(part) for part in parts} for each in deliveries]

    async def hand_over_and_take(
        self, delivery: Delivery, message: ScoredHeader | Taught, to: Stage, *stages: Stage
    ) -> tuple[bool, Delivery | None]:
        assert to is Stage.SCORED
        self.held -= 1
        if isinstance(message, Taught):
            self.taught[delivery.ticket_key], message = message.logprobs, message.scored
        self.handed_over[delivery.ticket_key] = message
        following = self._next(*stages)
        self.followed += following is not None
        return True, following

    async def give_back(
        self, delivery: Delivery, *, failed: bool = False, engine_died: bool = False, reason: str = ""
    ) -> None:
        assert not failed
        assert not engine_died
        self.given_back.append(delivery.ticket_key)

    async def bury(self, delivery: Delivery, reason: str) -> bool:
        self.held -= 1
        self.buried[delivery.ticket_key] = reason
        return True


async def test_groups_go_on_with_their_scores_and_malformed_ones_are_buried() -> None:
    stop = asyncio.Event()
    groups = [group(0), group(1, reward="nonsense"), group(3, purpose="eval")]
    consumer = FakeConsumer([groups[0], groups[1], b"\xc1 not a group", groups[2], groups[0], groups[0]], stop)
    consumer.parts["4"] = {}
    consumer.parts["5"] = {Part.TEXTS: encode(TextsPart(("7",)))}
    metrics = RewardMetrics()
    runner = FakeRunner(lambda call, attempt: OK if call.completion == 0 else TIMEOUT)
    async with asyncio.timeout(ANSWER_SECONDS):
        await score_groups(consumer, scoring(runner, metrics), metrics, stop, Permits(2, max_parked=4))

    scored = consumer.handed_over["0"]
    assert scored.group == decode(stored(groups[0]).header, RolloutHeader)
    assert [score.value for score in scored.scores] == [1.0, None]
    assert scored.scores[1].failure == "exact_match: killed after 10 s"
    assert scored.functions == ("exact_match",)
    unknown = consumer.handed_over["1"]
    assert unknown.functions == ()
    assert all(score.failure.startswith("unknown reward 'nonsense'") for score in unknown.scores)
    assert consumer.reads == {(Part.TEXTS,)}, "it reads more than it needs"
    assert list(consumer.buried) == ["2", "4", "5"]
    assert "not a RolloutHeader" in consumer.buried["2"]
    assert consumer.buried["4"] == "its texts are not in the queue"
    assert consumer.buried["5"] == "1 texts for 2 seeds"
    assert "3" in consumer.handed_over
    assert consumer.followed, "hand-overs do not take the next group"
    samples = metrics.registry.get_sample_value
    assert samples("penstock_reward_groups_total", {"outcome": "scored"}) == 3
    assert samples("penstock_reward_groups_total", {"outcome": "buried"}) == 3
    assert samples("penstock_reward_value_count") == 1  # evaluation and failures do not count


async def test_the_call_that_takes_the_last_free_group_also_waits_for_the_next() -> None:
    stop = asyncio.Event()
    consumer = FakeConsumer([group(number) for number in range(3)], stop)
    metrics = RewardMetrics()
    async with asyncio.timeout(ANSWER_SECONDS):
        await score_groups(consumer, scoring(FakeRunner(), metrics), metrics, stop, Permits(4, max_parked=4))
    assert len(consumer.handed_over) == 3
    assert consumer.takes_before_wait[0] == 3
    assert consumer.followed == 0


async def test_no_more_groups_are_held_than_can_be_scored() -> None:
    stop = asyncio.Event()
    consumer = FakeConsumer([group(number) for number in range(10)], stop)
    metrics = RewardMetrics()
    async with asyncio.timeout(ANSWER_SECONDS):
        await score_groups(consumer, scoring(FakeRunner(), metrics), metrics, stop, Permits(3, max_parked=4))
    assert len(consumer.handed_over) == 10
    assert consumer.most_held == 3


class StuckRunner(FakeRunner):
    """Calls that never end."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = asyncio.Event()

    async def run(self, *arguments: Any, **named: Any) -> list[Outcome]:
        self.entered.set()
        await asyncio.Event().wait()
        raise AssertionError("never")


async def test_at_the_end_what_is_not_scored_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock_reward.score_groups.DRAIN_SECONDS", 0.1)
    stop = asyncio.Event()
    consumer = FakeConsumer([group(0), group(1)], stop)
    runner, metrics = StuckRunner(), RewardMetrics()
    loop = asyncio.create_task(
        score_groups(consumer, scoring(runner, metrics), metrics, stop, Permits(1, max_parked=4))
    )
    async with asyncio.timeout(ANSWER_SECONDS):
        await runner.entered.wait()
        stop.set()
        await loop
    assert consumer.given_back == ["0"]
    assert not consumer.handed_over


async def test_the_score_of_the_environment_is_one_more_function() -> None:
    stop = asyncio.Event()
    consumer = FakeConsumer(
        [
            episodes(0, [Score(1.0), Score(None, "the tool crashed"), Score(-0.5)]),
            episodes(1, [Score(0.25)], reward="environment"),
            episodes(2, [Score(0.25)], reward="math"),
            episodes(3, [Score(None, "no reward")], reward="math"),
            group(4),
            group(5, reward="environment"),
        ],
        stop,
    )
    runner, metrics = FakeRunner(lambda call, attempt: Outcome(0.5, 0.01)), RewardMetrics()
    scorer = scoring(runner, metrics, functions={"environment": 2.0, "format_regex": 1.0}, breaker_failures=0)
    async with asyncio.timeout(ANSWER_SECONDS):
        await score_groups(consumer, scorer, metrics, stop, Permits(1, max_parked=4))
    scores = {key: scored.scores for key, scored in consumer.handed_over.items()}
    assert scores["0"] == (
        Score(2.5, values=(1.0, 0.5)),
        Score(None, "environment: the tool crashed"),
        Score(-0.5, values=(-0.5, 0.5)),
    )
    assert consumer.handed_over["0"].functions == ("environment", "format_regex")
    assert runner.rounds[0] == [Call("format_regex", 0), Call("format_regex", 2)], "the failed one was scored too"
    assert (scores["1"], scores["2"]) == ((Score(0.25),), (Score(0.5),))
    assert scores["3"] == (Score(None, "environment: no reward"),)
    for key in ("4", "5"):
        assert all("and this is no episode" in score.failure for score in scores[key])
    assert len(runner.rounds) == 2
    failures = {reason: metrics.registry.get_sample_value("penstock_reward_failures_total", {"reason": reason})
                for reason in ("environment", "unknown_reward")}  # fmt: skip
    assert failures == {"environment": 2, "unknown_reward": 2}


async def test_the_score_of_the_environment_alone_calls_nothing() -> None:
    attempts = scoring(FakeRunner(), functions={"environment": 1.0}).attempts(
        "p", ["a", "b"], "a", "", {}, [Score(0.5), Score(1.0)]
    )
    verdicts = await attempts.run()
    assert verdicts is not None
    assert [verdict.score for verdict in verdicts] == [Score(0.5), Score(1.0)]


async def test_rows_of_a_held_out_set_are_scored_by_its_own_functions() -> None:
    runner = FakeRunner(lambda call, attempt: Outcome({"numeric": 1.0, "mine:f": 0.5}[call.function], 0.0))
    section = RewardSection(functions={"exact_match": 1.0, "numeric": 0.0, "mine:f": 0.0})
    own = {"eval.sets.hard": {"numeric": 2.0, "mine:f": 1.0, "math": 0.0}}
    scorer = Scoring(section, runner, RewardMetrics(), own=own)
    [verdict] = await scorer.score("p", ["a"], "a", "eval.sets.hard", {})
    assert (verdict.score.value, verdict.score.values) == (2.5, (1.0, 0.5))
    assert {call.function for call in runner.rounds[0]} == {"numeric", "mine:f"}
    [named] = await scorer.score("p", ["a"], "a", "mine:f", {})
    assert named.score.value == 0.5, "a row may still name one function"
    with pytest.raises(RewardError, match=r"unknown reward 'eval\.sets\.other'"):
        scorer.weights("eval.sets.other")


async def test_training_groups_go_on_with_what_the_teacher_says_and_others_without() -> None:
    """A completion without a score is not asked about; one that the server refuses fails, the others stay."""
    stop, metrics = asyncio.Event(), RewardMetrics()
    groups = [group(0), group(1, purpose="eval"), group(2, texts=("7", "8", "9"), prompt_ids=pack_int32([1, 2, 3]))]
    consumer = FakeConsumer(groups, stop)
    runner = FakeRunner(lambda call, attempt: TIMEOUT if call.completion == 1 else OK)
    async with serving(FakeTeacher()) as fake:
        fake.longest = 3
        async with answering(teacher_of(fake.url, metrics=metrics)) as teacher:
            await score_groups(consumer, scoring(runner, metrics), metrics, stop, Permits(2, max_parked=4), teacher)
    assert sorted(consumer.handed_over) == ["0", "1", "2"]
    assert list(map(len, consumer.taught["0"])) == [4, 0]
    assert [score.value for score in consumer.handed_over["0"].scores] == [1.0, None]
    assert "1" not in consumer.taught
    refused = consumer.handed_over["2"].scores
    assert [score.value for score in refused] == [None, None, None]
    assert all(refused[index].failure.startswith("teacher: ") for index in (0, 2))
    assert "longer than 3 tokens" in refused[0].failure
    assert metrics.registry.get_sample_value("penstock_reward_failures_total", {"reason": "teacher"}) == 2


async def test_a_group_at_the_teacher_keeps_no_other_from_being_scored_and_is_given_back_at_the_end() -> None:
    stop, metrics, arrived = asyncio.Event(), RewardMetrics(), asyncio.Event()
    groups = [group(number) for number in range(4)]
    consumer = FakeConsumer(groups, stop)

    async def never(sequences: list[list[int]]) -> None:
        if sequences != [[0, 0]]:
            if len(fake.asked) == len(groups):
                arrived.set()
            await asyncio.Event().wait()

    async with serving(FakeTeacher()) as fake:
        fake.fault = never
        async with answering(teacher_of(fake.url, metrics=metrics)) as teacher:
            permits = Permits(1, max_parked=4)
            scoring_all = asyncio.create_task(
                score_groups(consumer, scoring(FakeRunner(), metrics), metrics, stop, permits, teacher)
            )
            await arrived.wait()
            assert metrics.registry.get_sample_value("penstock_reward_groups_at_teacher") == len(groups)
            scoring_all.cancel()
            await asyncio.gather(scoring_all, return_exceptions=True)
    assert sorted(consumer.given_back) == ["0", "1", "2", "3"]
    assert consumer.handed_over == {}

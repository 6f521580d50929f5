"""Attempts at a teacher's servers: an outage fails nothing, and what is a group's own fault ends."""

import asyncio
from collections.abc import Sequence

import pytest
from fastapi import Response

from penstock.contracts import RolloutGroup, unpack_float32
from penstock.errors import EngineError, EngineRejectedError
from penstock_reward.metrics import RewardMetrics
from penstock_reward.teacher import servers
from penstock_reward.teacher.questions import questions_of
from penstock_reward.teacher.server import TeacherServer, read_answer
from penstock_reward.teacher.teacher import Teacher
from tests.patience import ANSWER_SECONDS
from tests.unit.reward.teacher.teacher_setup import FakeTeacher, answering, logprob, serving, teacher_of
from tests.unit.trainer.trainer_groups import completion, scored_group

PROMPT = (4, 5, 6)
ANSWERS = ((7, 8), (9,), (7, 8), (10, 11, 12))
GONE = Response("the engine is gone", 503)


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PROBE_SECONDS", 0.01)


def group_of(answers: Sequence[Sequence[int]] = ANSWERS) -> RolloutGroup:
    made = [completion(each, [-1.0] * len(each)) for each in answers]
    return scored_group(0, PROMPT, made, [1.0] * len(made)).group


def expected(answer: Sequence[int]) -> list[float]:
    sequence = [*PROMPT, *answer]
    return [logprob(sequence, place) for place in range(len(PROMPT), len(sequence))]


def told(logprobs: Sequence[bytes]) -> list[list[float]]:
    return [unpack_float32(each) for each in logprobs]


def sample(metrics: RewardMetrics, name: str, **labels: str) -> float:
    value = metrics.registry.get_sample_value(f"penstock_reward_{name}", labels)
    assert value is not None
    return value


async def test_the_first_completion_brings_the_prompt_and_the_others_follow_together() -> None:
    metrics = RewardMetrics()
    async with serving(FakeTeacher()) as fake, answering(teacher_of(fake.url, metrics=metrics)) as teacher:
        answers = await teacher.taught(group_of(), [True, True, False, True])
    assert told(answers.logprobs) == [expected(ANSWERS[0]), expected(ANSWERS[1]), [], expected(ANSWERS[3])]
    assert [len(each) for each in fake.asked] == [1, 2]
    assert {start for each in fake.asked for _, start in each} == {len(PROMPT) - 1}, "the prompt is computed again"
    assert sample(metrics, "teacher_tokens_total") == 6
    assert sample(metrics, "teacher_request_duration_seconds_count") == 2
    assert sample(metrics, "groups_at_teacher") == 0


async def test_a_server_has_at_most_as_many_completions_as_it_may_and_the_idle_one_is_next() -> None:
    release = asyncio.Event()

    async def held(sequences: list[list[int]]) -> None:
        if sequences != [[0, 0]]:
            await release.wait()

    async with serving(FakeTeacher()) as one, serving(FakeTeacher()) as two:
        one.fault = two.fault = held
        async with answering(teacher_of(one.url, two.url, max_running_requests=2)) as teacher:
            tasks = [asyncio.create_task(teacher.taught(group_of(), [True] * 4)) for _ in range(8)]
            while one.num_running + two.num_running < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert (one.num_running, two.num_running) == (2, 2)
            release.set()
            for task in tasks:
                assert told((await task).logprobs) == [expected(each) for each in ANSWERS]
    assert max(one.most_running, two.most_running) <= 2


async def test_an_outage_fails_no_group_however_long_it_lasts() -> None:
    """Of all servers at once."""
    metrics = RewardMetrics()
    async with serving(FakeTeacher()) as one, serving(FakeTeacher()) as two:

        async def gone(sequences: list[list[int]]) -> Response:
            return GONE

        teacher = teacher_of(one.url, two.url, metrics=metrics)
        async with answering(teacher):
            await teacher.taught(group_of(), [True] * 4)
            one.fault = two.fault = gone
            tasks = [asyncio.create_task(teacher.taught(group_of(), [True] * 4)) for _ in range(3)]
            while len(teacher.servers.down) < 2 or one.num_probes < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert not any(task.done() for task in tasks)
            assert "503: the engine is gone" in (teacher.servers.not_ready or "")
            assert (sample(metrics, "teacher_servers_down"), sample(metrics, "groups_at_teacher")) == (2, 3)
            two.fault = None
            for task in tasks:
                assert told((await task).logprobs) == [expected(each) for each in ANSWERS]
            assert list(teacher.servers.down) == [one.url]
            assert teacher.servers.not_ready is None
    assert sample(metrics, "teacher_failures_total", reason="error") >= 2


async def test_a_server_that_answers_probes_is_left_alone_before_it_is_asked_again() -> None:
    """Its queue is full for a while, say."""
    num_sleeps = 0

    async def until_it_has_room(seconds: float) -> None:
        nonlocal num_sleeps
        assert seconds == servers.PROBE_SECONDS
        num_sleeps += 1

    async def full(sequences: list[list[int]]) -> Response | None:
        return Response("the queue is full", 503) if num_sleeps == 0 and sequences != [[0, 0]] else None

    async with serving(FakeTeacher()) as fake:
        fake.fault = full
        asked = servers.TeacherServers([TeacherServer(fake.url, ANSWER_SECONDS)], 16, until_it_has_room)
        async with answering(Teacher(asked, RewardMetrics(), max_running=16)) as teacher:
            answers = await teacher.taught(group_of(), [True] * 4)
    assert answers.failed == {}
    assert (num_sleeps, fake.num_probes) == (1, 2), "the first probe is at once"


async def test_a_server_that_answers_nothing_but_probes_fails_no_group_beside_another_one() -> None:
    """However busy the other one is."""

    async def refuse(sequences: list[list[int]]) -> Response | None:
        return Response("bad gateway", 502) if sequences != [[0, 0]] else None

    async def slow(sequences: list[list[int]]) -> None:
        if sequences != [[0, 0]]:
            await asyncio.sleep(0.1)

    async with serving(FakeTeacher()) as bad, serving(FakeTeacher()) as good:
        bad.fault, good.fault = refuse, slow
        async with answering(teacher_of(bad.url, good.url, max_running_requests=4)) as teacher:
            found = await asyncio.gather(*(teacher.taught(group_of(), [True] * 4) for _ in range(8)))
    assert [each.failed for each in found] == [{}] * 8
    assert bad.asked


async def test_a_server_that_is_not_there_yet_delays_the_first_groups() -> None:
    async with serving(FakeTeacher()) as early:
        absent = early.url
    teacher = teacher_of(absent)
    async with answering(teacher):
        task = asyncio.create_task(teacher.taught(group_of(), [True] * 4))
        while "ConnectError" not in (teacher.servers.not_ready or ""):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_group_that_brings_down_a_server_which_answers_others_fails() -> None:
    async with serving(FakeTeacher()) as fake:

        async def dies_of_eleven(sequences: list[list[int]]) -> Response | None:
            return GONE if any(11 in each for each in sequences) else None

        fake.fault = dies_of_eleven
        async with answering(teacher_of(fake.url)) as teacher:
            answers = await teacher.taught(group_of(), [True] * 4)
            assert told((await teacher.taught(group_of(ANSWERS[:2]), [True] * 2)).logprobs) == [
                expected(each) for each in ANSWERS[:2]
            ]
    assert told(answers.logprobs) == [expected(ANSWERS[0]), [], [], []]
    assert list(answers.failed) == [1, 2, 3]
    assert all("503: the engine is gone" in reason for reason in answers.failed.values())
    assert sum(any(11 in sequence for sequence, _ in each) for each in fake.asked) == 3, (
        "as often as others may have been at fault"
    )


async def test_what_a_server_refuses_fails_alone() -> None:
    async with serving(FakeTeacher()) as fake:
        fake.longest = 5
        async with answering(teacher_of(fake.url)) as teacher:
            answers = await teacher.taught(group_of(), [True] * 4)
            assert teacher.servers.down == {}
    assert told(answers.logprobs) == [*(expected(each) for each in ANSWERS[:3]), []]
    assert "longer than 5 tokens" in answers.failed[3]


async def test_a_server_that_does_not_answer_in_time_is_named_with_the_key() -> None:
    async with serving(FakeTeacher()) as fake:

        async def never(sequences: list[list[int]]) -> None:
            if sequences != [[0, 0]]:
                await asyncio.Event().wait()

        fake.fault = never
        async with answering(teacher_of(fake.url, timeout_seconds=0.2)) as teacher:
            answers = await teacher.taught(group_of(ANSWERS[:1]), [True])
    assert "did not answer in 0.2 s (teacher.timeout_seconds)" in answers.failed[0]


@pytest.mark.parametrize(
    ("pairs", "error", "seen"),
    [
        ("[[null,6],[-1.0,7]]", EngineError, "log-probabilities of 2 tokens"),
        ("[[null,6],[-1.0,7],[-2.0,9]]", EngineError, "which are not those asked"),
        ("[[null,6],[-1.0,7],[null,8]]", EngineRejectedError, "not finite"),
        ("null", EngineError, "lacks a part"),
    ],
)
def test_an_answer_of_something_else_is_no_answer(pairs: str, error: type[Exception], seen: str) -> None:
    questions = questions_of(group_of(ANSWERS[:1]), [True])
    body = f'[{{"meta_info": {{"input_token_logprobs": {pairs}}}}}]'.encode()
    with pytest.raises(error, match=seen):
        read_answer(body, questions)


def test_an_answer_to_too_few_questions_is_none() -> None:
    body = b'[{"meta_info": {"input_token_logprobs": []}}]'
    with pytest.raises(EngineError, match="answered 1 times to 2 questions"):
        read_answer(body, 2 * questions_of(group_of(ANSWERS[:1]), [True]))

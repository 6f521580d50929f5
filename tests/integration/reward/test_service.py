"""The reward service as a process, against a real queue: scores, errors at start, dead letters, its end."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml
from fastapi import Response

from penstock.broker import Delivery, Queue, Stage, Worker, connect
from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config
from penstock.contracts import (
    Completion,
    PolicyIdentity,
    RolloutGroup,
    Sampling,
    ServiceKind,
    Ticket,
    VersionSpan,
    decode,
    pack_float32,
    pack_int32,
)
from penstock.contracts.services import ServiceRecord
from penstock.contracts.stored_groups import Part, ScoredHeader, Stored, scored_group, stored
from penstock_launch.commands.status import NotRunningError, show_status
from tests.integration.broker.queue_setup import part_keys, put
from tests.patience import START_SECONDS
from tests.unit.reward.teacher.teacher_setup import FakeTeacher, logprob, serving

pytestmark = [pytest.mark.redis, pytest.mark.slow]

FUNCTIONS = """
import os, time

def obey(prompt, completion, answer, metadata):
    '''Obeys the completion.'''
    if completion == "die":
        os._exit(1)
    if completion == "hang":
        time.sleep(600)
    return float(completion)

def square(prompt, completion, answer, metadata):
    return float(completion) ** 2
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path / "queue")
    server.start()
    yield server
    server.stop()


def configured(folder: Path, server: EmbeddedServer | None, **reward: Any) -> Path:
    (folder / "mine.py").write_text(FUNCTIONS)
    section = {
        "functions": {"mine:obey": 1.0},
        "modules_path": str(folder),
        "timeout_seconds": 4,
        "max_attempts": 1,
        **reward,
    }
    redis = {"url": "redis://127.0.0.1:1/0", "timeout_seconds": 1}
    if server is not None:
        redis = {"url": server.url, "password": server.password}
    path = folder / "config.yaml"
    document = {
        "run": {"name": "reward-test"},
        "actor": {"path": "unused"},
        "data": {"train": {"path": "unused.jsonl"}},
        "reward": section,
        "redis": redis,
    }
    path.write_text(yaml.safe_dump(document))
    return path


def start(config: Path) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "penstock_reward", "--config", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def load(path: Path) -> Config:
    return Config.model_validate(yaml.safe_load(path.read_text()))


def group(number: int, *texts: str) -> RolloutGroup:
    ticket = Ticket(
        purpose="train",
        number=number,
        attempt=0,
        policy_version=0,
        prompt="p",
        prompt_ids=pack_int32([1]),
        seeds=tuple(range(len(texts))),
        sampling=Sampling(1.0, 4, (2,)),
        answer="7",
        reward="",
        metadata={},
    )
    span = VersionSpan(PolicyIdentity(0, "0" * 16), 0, 1)
    completions = tuple(
        Completion(pack_int32([5]), b"\x01", pack_float32([-0.5]), (span,), text, "stop") for text in texts
    )
    return RolloutGroup(ticket, completions, "http://server", 1.0, 2.0)


async def test_groups_are_scored_malformed_ones_die_and_sigterm_ends_it(tmp_path: Path, server: EmbeddedServer) -> None:
    path = configured(tmp_path, server, advertise_host="localhost")
    config = load(path)
    queue = await connect(config)
    process = start(path)
    try:
        name = await put(queue, Stage.ROLLOUTS, "0", stored(group(0, "0.5", "die", "hang", "2", "word")))
        await put(queue, Stage.ROLLOUTS, "1", Stored(b"junk"))
        consumer = Worker(queue, "trainer", config.staleness)
        deliveries: dict[str, Delivery] = {}
        deadline = time.monotonic() + START_SECONDS
        while len(deliveries) < 2:
            assert time.monotonic() < deadline, "expected two entries in the scored stream"
            assert process.poll() is None, process.communicate()
            if (delivery := await consumer.take(Stage.SCORED)) is None:
                await consumer.wait(timeout_seconds=1)
            else:
                deliveries[delivery.ticket_key] = delivery
        assert deliveries["0"].parts == name
        assert await part_keys(queue) == {queue.keys.part(name, Part.COMPLETIONS): -1}, "scored: nobody reads its texts"
        scores = decode(deliveries["0"].payload, ScoredHeader).scores
        assert [score.value for score in scores] == [0.5, None, None, 2.0, None]
        assert "exit code 1" in scores[1].failure
        assert "reward.timeout_seconds" in scores[2].failure
        assert "ValueError: could not convert string to float: 'word'" in scores[4].failure
        assert "not a RolloutHeader" in deliveries["1"].reason
        assert (await queue.depths())["dead"] == 1

        [record] = [each for each in await queue.services() if each.kind is ServiceKind.REWARD]
        assert record.pid == process.pid
        assert record.url.startswith("http://localhost:")  # reward.advertise_host
        async with httpx.AsyncClient(base_url=record.url) as http:
            assert (await http.get("/ready")).status_code == 200
            answer = await http.post("/v1/score", json={"completions": ["3", "x"], "answer": "7"})
            assert [each["value"] for each in answer.json()["scores"]] == [3.0, None]
            assert (await http.post("/v1/score", json={"completion": "hang", "answer": "7"})).status_code == 504
            metrics = (await http.get("/metrics")).text
        assert 'penstock_reward_failures_total{reason="timeout"} 2.0' in metrics
        assert re.search(r'penstock_reward_score_duration_seconds_count\{function="mine:obey"\} 8', metrics)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 0, errors
        assert [each for each in await queue.services() if each.kind is ServiceKind.REWARD] == []
    finally:
        process.kill()
        process.communicate()
        await queue.close()


async def test_rows_of_a_held_out_set_are_scored_by_its_own_functions(tmp_path: Path, server: EmbeddedServer) -> None:
    path = configured(tmp_path, server)
    document = yaml.safe_load(path.read_text())
    document["data"]["eval"] = {"path": "unused.jsonl"}
    document["eval"] = {"sets": {"hard": {"path": "unused.jsonl", "functions": {"mine:square": 1.0, "mine:obey": 0.5}}}}
    path.write_text(yaml.safe_dump(document))
    queue = await connect(load(path))
    process = start(path)
    try:
        made = group(0, "3")
        held_out = msgspec.structs.replace(made.ticket, purpose="eval", reward="eval.sets.hard")
        await put(queue, Stage.ROLLOUTS, "e0", stored(msgspec.structs.replace(made, ticket=held_out)))
        consumer = Worker(queue, "trainer", load(path).staleness)
        deadline = time.monotonic() + START_SECONDS
        while (delivery := await consumer.take(Stage.SCORED)) is None:
            assert time.monotonic() < deadline, "expected an entry in the scored stream"
            assert process.poll() is None, process.communicate()
            await consumer.wait(timeout_seconds=1)
        header = decode(delivery.payload, ScoredHeader)
        assert (header.functions, header.scores[0].value) == (("mine:obey", "mine:square"), 0.5 * 3 + 9)
        [record] = [each for each in await queue.services() if each.kind is ServiceKind.REWARD]
        async with httpx.AsyncClient(base_url=record.url) as http:
            for reward, value in (("", 3.0), ("eval.sets.hard", 10.5)):
                asked = {"completions": ["3"], "answer": "7", "reward": reward}
                assert (await http.post("/v1/score", json=asked)).json()["scores"][0]["value"] == value
    finally:
        process.kill()
        process.communicate()
        await queue.close()


async def test_a_call_that_hangs_is_in_the_status_long_before_its_deadline(
    tmp_path: Path, server: EmbeddedServer
) -> None:
    path = configured(tmp_path, server, timeout_seconds=10 * START_SECONDS)
    config = load(path)
    queue = await connect(config)
    process = start(path)
    try:
        await put(queue, Stage.ROLLOUTS, "0", stored(group(0, "hang", "1", "2")))
        deadline = time.monotonic() + START_SECONDS
        seen: list[str] = []
        while not any(": mine:obey: 3 calls wait, the oldest for " in line for line in seen):
            assert time.monotonic() < deadline, seen
            assert process.poll() is None, process.communicate()
            await asyncio.sleep(0.2)
            with contextlib.suppress(NotRunningError):
                seen = await asyncio.to_thread(show_status, config)
    finally:
        process.kill()
        process.communicate()
        await queue.close()


def ended(config: Path) -> tuple[int, str]:
    process = start(config)
    try:
        _, errors = process.communicate(timeout=START_SECONDS)
    finally:
        process.kill()
    return process.returncode, errors


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ({"functions": {"exact_mach": 1.0}}, "reward.functions names 'exact_mach'"),
        ({"functions": {"mine:absent": 1.0}}, "reward.functions names 'mine:absent', which cannot be loaded"),
        ({"functions": {"absent:f": 1.0}}, "ModuleNotFoundError: No module named 'absent'"),
        ({"modules_path": "/nowhere"}, "reward.modules_path is '/nowhere'"),
    ],
)
def test_a_reward_that_cannot_be_loaded_is_one_clear_line(
    reward: dict[str, Any], expected: str, tmp_path: Path, server: EmbeddedServer
) -> None:
    code, errors = ended(configured(tmp_path, server, **reward))
    assert code == 2
    assert expected in errors
    assert "Traceback" not in errors


def test_an_unreachable_queue_is_one_clear_line(tmp_path: Path) -> None:
    code, errors = ended(configured(tmp_path, None))
    assert code == 4
    assert "redis.url" in errors
    assert "Traceback" not in errors


async def test_a_teacher_that_is_away_delays_groups_and_its_answers_travel_with_them(
    tmp_path: Path, server: EmbeddedServer
) -> None:
    """The service says why it waits; the completion without a score is not asked about."""
    path = configured(tmp_path, server)

    async def gone(sequences: list[list[int]]) -> Response:
        return Response("loading", 503)

    async with serving(FakeTeacher()) as fake:
        fake.fault = gone
        document = yaml.safe_load(path.read_text()) | {"teacher": {"urls": [fake.url]}}
        path.write_text(yaml.safe_dump(document))
        config = load(path)
        queue = await connect(config)
        process = await asyncio.to_thread(start, path)
        try:
            name = await put(queue, Stage.ROLLOUTS, "0", stored(group(0, "0.5", "word", "2")))
            async with asyncio.timeout(START_SECONDS):
                while not (records := await reward_records(queue)) or not records[0].open_breakers:
                    assert process.poll() is None, process.communicate()
                    await asyncio.sleep(0.1)
                assert records[0].state.startswith(f"breaker open: teacher {fake.url} (")
                assert "503: loading" in records[0].open_breakers[f"teacher {fake.url}"]
                async with httpx.AsyncClient(base_url=records[0].url) as http:
                    ready = await http.get("/ready")
                    assert (ready.status_code, "no server of teacher.urls answers" in ready.text) == (503, True)
                    metrics = (await http.get("/metrics")).text
                    assert "penstock_reward_teacher_servers_down 1.0" in metrics
                    assert 'penstock_reward_breaker_open{function="teacher"} 1.0' in metrics
                    fake.fault = None
                    consumer = Worker(queue, "trainer", config.staleness)
                    while (delivery := await consumer.take(Stage.SCORED)) is None:
                        await consumer.wait(timeout_seconds=1)
                    assert (await http.get("/ready")).status_code == 200
            assert delivery.parts == name
            [parts] = await consumer.read([delivery], *Part)
            scored = scored_group(decode(delivery.payload, ScoredHeader), parts)
            assert [score.value for score in scored.scores] == [0.5, None, 2.0]
            one = pack_float32([logprob([1, 5], 1)])
            assert (scored.teacher_logprobs, scored.is_taught) == ((one, b"", one), True)
        finally:
            process.kill()
            await asyncio.to_thread(process.communicate)
            await queue.close()


async def reward_records(queue: Queue) -> list[ServiceRecord]:
    return [each for each in await queue.services() if each.kind is ServiceKind.REWARD]

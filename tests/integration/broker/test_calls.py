"""What `Calls` needs from redis-py below its public commands. If this passes, a new major version may be allowed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ResponseError

from penstock.broker import Queue, Stage
from penstock.broker.calls import Calls


@pytest.fixture
async def calls(queue: Queue) -> AsyncIterator[Calls]:
    made = Calls(queue.client)
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("given", "received"),
    [
        ("text", b"text"),
        ("", b""),
        ("Gr\u00f6\u00dfe \U0001f600", "Gr\u00f6\u00dfe \U0001f600".encode()),
        ("two words\r\n$3\r\n", b"two words\r\n$3\r\n"),
        (Stage.SCORED, b"scored"),
        (b"\x00\xff\r\n", b"\x00\xff\r\n"),
        (-(2**63), b"-9223372036854775808"),
        (b"x" * 2_000_000, b"x" * 2_000_000),
    ],
)
async def test_arguments_arrive_as_they_are(calls: Calls, given: str | bytes | int, received: bytes) -> None:
    assert await calls.read("ECHO", given) == received


async def test_a_connection_serves_one_call_after_another_and_never_two_at_once(calls: Calls) -> None:
    first = await calls.read("CLIENT", "ID")
    assert await calls.read("CLIENT", "ID") == first
    together = await asyncio.gather(*[calls.read("CLIENT", "ID") for _ in range(3)])
    assert len(set(together)) == 3
    assert first in together


async def test_a_refused_call_leaves_its_connection_in_order(calls: Calls, queue: Queue) -> None:
    first = await calls.read("CLIENT", "ID")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await calls.read("GET", queue.keys.stream(Stage.TICKETS))
    assert await calls.read("CLIENT", "ID") == first


async def test_the_connection_of_a_cancelled_call_is_not_used_again(calls: Calls, queue: Queue) -> None:
    first = await calls.read("CLIENT", "ID")
    waiting = asyncio.create_task(calls.read("BLPOP", queue.keys.name("list"), 5))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await queue.client.lpush(queue.keys.name("list"), "late")
    assert await calls.read("CLIENT", "ID") != first


async def test_a_call_whose_connection_breaks_is_repeated_by_the_client(calls: Calls, queue: Queue) -> None:
    first = await calls.read("CLIENT", "ID")
    waiting = asyncio.create_task(calls.read("BLPOP", queue.keys.name("list"), 5))
    await asyncio.sleep(0.05)
    await queue.client.client_kill_filter(_id=str(first))
    await queue.client.lpush(queue.keys.name("list"), "value")
    assert list(await waiting) == [queue.keys.name("list").encode(), b"value"]


async def test_an_answer_has_the_same_form_after_its_connection_broke(calls: Calls, queue: Queue) -> None:
    fields: Any = {b"one": b"1", b"two": b"2"}
    await queue.guard(queue.client.hset(queue.keys.counters, mapping=fields))
    assert await calls.read("HGETALL", queue.keys.counters) == fields
    await queue.client.client_kill_filter(_id=str(await calls.read("CLIENT", "ID")))
    assert await calls.read("HGETALL", queue.keys.counters) == fields

"""Which requests are one call."""

import pytest

from penstock_agent.gateway.calls import REPEAT_SECONDS, Call, Calls
from penstock_agent.gateway.refusals import RequestRefusedError
from penstock_agent.gateway.requests import ChatRequest


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """Calls, and requests for one conversation."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.calls = Calls(self.clock)

    def find(self, *, text: str = "a", retry: bool = False, key: str = "") -> Call | None:
        request = self._request(text, retry, key)
        return self.calls.find(request, request.digest)

    def begin(self, *, text: str = "a", key: str = "") -> Call:
        request = self._request(text, False, key)
        return self.calls.begin(request, request.digest)

    def _request(self, text: str, retry: bool, key: str) -> ChatRequest:
        return ChatRequest([{"role": "user", "content": text}], [], is_retry=retry, idempotency_key=key)


async def test_what_nobody_waits_for_any_more_is_asked_again() -> None:
    asked = Asked()
    call = asked.begin()
    with call.waited_for():
        assert asked.find() is None  # two clients at once: siblings
    assert asked.find() is call
    assert asked.find(text="b") is None


async def test_a_delivered_answer_is_not_given_again() -> None:
    asked = Asked()
    asked.calls.delivered(asked.begin())
    assert asked.find() is None


async def test_a_retry_joins_a_call_that_still_has_a_client() -> None:
    asked = Asked()
    call = asked.begin()
    with call.waited_for():  # the server has not seen yet that the client has gone
        assert asked.find(retry=True) is call


async def test_retries_of_siblings_join_one_each() -> None:
    asked = Asked()
    one, two = asked.begin(), asked.begin()
    with one.waited_for(), two.waited_for():
        first = asked.find(retry=True)
        assert first is not None
        with first.waited_for():
            second = asked.find(retry=True)
    assert {first, second} == {one, two}


async def test_a_retry_is_for_an_answer_that_was_lost_on_its_way() -> None:
    asked = Asked()
    call = asked.begin()
    asked.calls.delivered(call)
    asked.clock.now += REPEAT_SECONDS / 2
    assert asked.find(retry=True) is call
    asked.clock.now += REPEAT_SECONDS
    assert asked.find(retry=True) is None


async def test_a_retry_after_an_error_is_for_no_answer_of_before() -> None:
    asked = Asked()
    asked.calls.delivered(asked.begin())
    asked.calls.failed(asked.begin())
    assert asked.find(retry=True) is None


async def test_an_idempotency_key_names_its_call_for_ever() -> None:
    asked = Asked()
    call = asked.begin(key="k")
    assert asked.find(key="k") is call
    asked.calls.delivered(call)
    asked.clock.now += 10 * REPEAT_SECONDS
    assert asked.find(key="k") is call
    assert asked.find(key="other") is None
    with pytest.raises(RequestRefusedError, match="Idempotency-Key"):
        asked.find(text="b", key="k")


async def test_a_failed_call_is_forgotten() -> None:
    asked = Asked()
    asked.calls.failed(asked.begin(key="k"))
    assert asked.find(key="k") is None
    assert asked.find() is None


async def test_only_recorded_answers_that_reached_nobody_are_undelivered() -> None:
    asked = Asked()
    calls = [asked.begin(text=text) for text in "abc"]
    calls[0].recorded, calls[1].recorded = 0, 1
    asked.calls.delivered(calls[0])
    assert asked.calls.undelivered() == {1}


async def test_delivered_answers_are_not_kept() -> None:
    asked = Asked()
    for number in range(100):
        asked.calls.delivered(asked.begin(text=str(number)))
        asked.clock.now += 1
    assert asked.find(text="98", retry=True) is not None
    assert len(asked.calls._by_digest) <= REPEAT_SECONDS + 1

"""Retries: which calls are tried again, how often, and after what wait."""

import socket
from random import Random

import httpx
import pytest

from penstock.config import RewardSection
from penstock.errors import TransientRewardError
from penstock_reward.processes.child import kind_of
from penstock_reward.scoring.attempts import back_off_seconds
from tests.unit.reward.scoring.test_breaker import DOWN, WRONG, ServerScoring
from tests.unit.reward.scoring.test_scoring import OK, FakeRunner


async def test_what_may_pass_is_tried_again_with_longer_waits_and_what_may_not_is_not() -> None:
    outcomes = {0: DOWN, 1: WRONG, 2: OK}
    runner = FakeRunner(lambda call, attempt: outcomes[call.completion])
    setup = ServerScoring(runner, breaker_failures=0, max_attempts=4, retry_seconds=1, retry_cap_seconds=3)
    verdicts = await setup.scoring.score("p", ["a", "b", "c"], "a", "", {})
    assert [[call.completion for call in calls] for calls in runner.rounds] == [[0, 1, 2], [0], [0], [0]]
    assert [verdict.score.value for verdict in verdicts] == [None, None, 1.0]
    assert len(setup.naps) == 3
    for nap, longest in zip(setup.naps, (1, 2, 3), strict=True):
        assert longest / 2 <= nap <= longest


def test_the_back_off_is_capped_for_any_attempt() -> None:
    section = RewardSection(retry_seconds=1, retry_cap_seconds=4)
    assert all(2 <= back_off_seconds(900, section, Random(seed)) <= 4 for seed in range(50))
    assert len({back_off_seconds(1, section, Random(seed)) for seed in range(50)}) == 50


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TransientRewardError("busy"), "transient"),
        (ConnectionResetError(), "transient"),
        (TimeoutError(), "transient"),
        (OSError("no route to host"), "transient"),
        (FileNotFoundError("table.json"), "exception"),
        (TypeError("no"), "exception"),
        (ValueError("no"), "exception"),
        (SystemExit(1), "exception"),
        (because(ValueError("answered 503"), ConnectionResetError()), "transient"),
        (because(ValueError("no table"), FileNotFoundError("table.json")), "exception"),
    ],
)
def test_an_exception_that_may_pass_is_kept_apart_from_one_that_may_not(error: BaseException, kind: str) -> None:
    assert kind_of(error) == kind


def test_what_httpx_raises_without_a_connection_may_pass() -> None:
    with socket.socket() as held:  # a port at which nobody listens
        held.bind(("127.0.0.1", 0))
        with pytest.raises(httpx.ConnectError) as raised:
            httpx.get(f"http://127.0.0.1:{held.getsockname()[1]}", trust_env=False)
    assert kind_of(raised.value) == "transient"

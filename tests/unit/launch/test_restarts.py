"""When the launcher restarts a service, and when it gives up."""

import pytest

from penstock.errors import (
    ConfigError,
    DataError,
    EngineStartError,
    LeaseLostError,
    NonFiniteError,
    QueueError,
    RewardError,
    StallError,
)
from penstock_launch.supervise.restarts import Deaths, GiveUp, Restart, RestartPolicy


def test_delay_doubles_up_to_the_longest() -> None:
    deaths = Deaths(RestartPolicy(max_deaths=100, first_delay_seconds=1, longest_delay_seconds=6))
    delays = [deaths.died(1, now=float(second)) for second in range(5)]
    assert delays == [Restart(1), Restart(2), Restart(4), Restart(6), Restart(6)]


def test_five_deaths_within_two_minutes_end_it() -> None:
    deaths = Deaths(RestartPolicy())
    for second in (0, 30, 60, 90):
        assert isinstance(deaths.died(1, now=second), Restart)
        deaths.ready()
    verdict = deaths.died(1, now=119)
    assert verdict == GiveUp("it died 5 times within 120 s")


def test_deaths_far_apart_go_on_for_ever_and_start_with_the_first_delay() -> None:
    deaths = Deaths(RestartPolicy())
    for second in range(0, 3000, 300):
        assert deaths.died(-9, now=second) == Restart(0.5)
        deaths.ready()


def test_slow_deaths_before_it_can_work_end_it_too() -> None:
    deaths = Deaths(RestartPolicy())
    verdicts = [deaths.died(1, now=second) for second in range(0, 1500, 300)]
    assert verdicts[-1] == GiveUp("it died 5 times in a row before it could work")
    assert all(isinstance(verdict, Restart) for verdict in verdicts[:-1])


@pytest.mark.parametrize("error", [ConfigError, DataError, RewardError, StallError, LeaseLostError, NonFiniteError])
def test_an_exit_code_that_a_restart_cannot_help_ends_it_at_once(error: type[ConfigError]) -> None:
    assert isinstance(Deaths(RestartPolicy()).died(error.exit_code, now=0), GiveUp)


def test_a_lost_queue_is_no_reason_to_end() -> None:
    assert isinstance(Deaths(RestartPolicy()).died(QueueError.exit_code, now=0), Restart)


def test_an_engine_that_never_started_ends_it_and_one_that_did_is_restarted() -> None:
    fresh, proven = Deaths(RestartPolicy()), Deaths(RestartPolicy())
    proven.ready()
    assert isinstance(fresh.died(EngineStartError.exit_code, now=0), GiveUp)
    assert isinstance(proven.died(EngineStartError.exit_code, now=0), Restart)

"""The clock of a step, on hosts whose time of day is wrong or is set."""

from types import SimpleNamespace

import pytest

from penstock_trainer.telemetry import step_clock
from penstock_trainer.telemetry.step_clock import Clock


class Time:
    """`time` as the test sets it: the time of day and the monotonic clock go by themselves."""

    def __init__(self) -> None:
        self.of_day, self.passed = 1_000.0, 50.0

    def pass_by(self, seconds: float) -> None:
        self.of_day, self.passed = self.of_day + seconds, self.passed + seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    own = Time()
    monkeypatch.setattr(
        step_clock, "time", SimpleNamespace(time=lambda: own.of_day, monotonic=lambda: own.passed), raising=True
    )
    return own


def test_a_time_of_day_that_is_set_back_changes_no_duration(time: Time) -> None:
    clock = Clock()
    time.pass_by(2.0)
    time.of_day -= 3600
    clock.lap("wait")
    time.pass_by(1.0)
    clock.lap("update")
    assert clock.elapsed_seconds == 3.0
    assert clock.seconds == {"wait": 2.0, "update": 1.0}


def test_the_wait_for_servers_to_start_and_a_checkpoint_are_left_out(time: Time) -> None:
    clock = Clock()
    time.pass_by(4.0)
    clock.leave_out()
    time.pass_by(10.0)
    clock.lap("wait")
    clock.begin_at(1_010.0)
    time.pass_by(1.0)
    assert (clock.started_at, clock.elapsed_seconds, clock.seconds) == (1_010.0, 5.0, {"wait": 4.0})


@pytest.mark.parametrize("ahead", [3600.0, 1e9])
def test_a_server_whose_clock_is_ahead_takes_no_more_than_the_wait(time: Time, ahead: float) -> None:
    clock = Clock()
    time.pass_by(10.0)
    clock.lap("wait")
    clock.begin_at(time.of_day + ahead)
    time.pass_by(1.0)
    assert (clock.started_at, clock.elapsed_seconds, clock.seconds) == (1_010.0, 1.0, {"wait": 0.0})

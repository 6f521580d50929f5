"""What is said of functions that keep their callers waiting, or fail."""

from dataclasses import dataclass

from penstock_reward.processes.in_flight import FAILED_IN_A_ROW, InFlight
from penstock_reward.processes.messages import Call, Outcome

OK = Outcome(1.0, 0.5)
KILLED = Outcome(None, 10.0, "timeout", "killed after 10 s (reward.timeout_seconds)")
WRONG = Outcome(None, 0.1, "exception", "KeyError: 'units'\n(own.py:2)")


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def calls(num: int, function: str = "own:judge") -> list[Call]:
    return [Call(function, index) for index in range(num)]


def answer(in_flight: InFlight, *outcomes: Outcome, function: str = "own:judge") -> None:
    for outcome in outcomes:
        with in_flight.running(function) as ended:
            ended(outcome)


def test_a_call_that_hangs_is_named_within_seconds_with_all_that_wait() -> None:
    in_flight = InFlight(clock := Clock())
    with in_flight.asked(calls(12)) as answered:
        clock.now = 27
        answer(in_flight, OK)
        answered(Call("own:judge", 0))
        with in_flight.running("own:judge"):
            clock.now = 31
            assert in_flight.describe() == "", "4 s are none to speak of, however long the others took"
            clock.now = 33
            assert in_flight.describe() == "own:judge: 11 calls wait, the oldest for 33 s"
    assert in_flight.describe() == ""


def test_a_function_that_always_takes_long_is_no_trouble() -> None:
    in_flight = InFlight(clock := Clock())
    answer(in_flight, Outcome(1.0, 20.0))
    with in_flight.asked(calls(1)), in_flight.running("own:judge"):
        clock.now = 40
        assert in_flight.describe() == ""
        clock.now = 61
        assert in_flight.describe() == "own:judge: 1 call waits for 61 s"


def test_attempts_that_fail_are_counted_until_one_gives_a_score() -> None:
    in_flight = InFlight(Clock())
    answer(in_flight, *[WRONG] * (FAILED_IN_A_ROW - 1))
    assert in_flight.describe() == ""
    answer(in_flight, WRONG)
    assert in_flight.describe() == "own:judge: 3 attempts failed in a row, last: KeyError: 'units' (own.py:2)"
    answer(in_flight, OK)
    assert in_flight.describe() == ""
    answer(in_flight, KILLED)
    assert in_flight.describe() == "own:judge: 1 attempt failed in a row, last: " + KILLED.reason


def test_each_function_is_named() -> None:
    in_flight = InFlight(clock := Clock())
    answer(in_flight, KILLED, function="own:other")
    with in_flight.asked([*calls(2), *calls(1, "own:quick")]), in_flight.running("own:judge"):
        clock.now = 9
        assert in_flight.describe() == (
            "own:other: 1 attempt failed in a row, last: killed after 10 s (reward.timeout_seconds); "
            "own:judge: 2 calls wait, the oldest for 9 s"
        )

"""Looks run side by side; one that fails or never answers becomes a line, in its place."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from penstock_launch.doctor.report import Line, not_looked_at, ok
from penstock_launch.doctor.side_by_side import Look, later, look_at_all
from tests.patience import ANSWER_SECONDS


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """Not set until the test has ended."""
    event = threading.Event()
    yield event
    event.set()


def fails() -> Sequence[Line]:
    raise OSError(28, "No space left")


def test_a_look_that_fails_is_a_line(never: threading.Event) -> None:
    groups = look_at_all([Look("a", "disk", fails), Look("b", "cores", lambda: [ok("cores", "2")])], ANSWER_SECONDS)
    assert [(group.title, list(group.lines)) for group in groups] == [
        ("a", [not_looked_at("disk", "OSError: [Errno 28] No space left")]),
        ("b", [ok("cores", "2")]),
    ]


def test_a_look_that_never_answers_is_a_line(never: threading.Event) -> None:
    def hangs() -> Sequence[Line]:
        never.wait()
        return []

    looks = [Look("a", "driver", hangs), Look("a", "disk", hangs), Look("a", "cores", lambda: [ok("cores", "2")])]
    (group,) = look_at_all(looks[:2], 0.2)
    assert list(group.lines) == [not_looked_at(what, "no answer within 0.2 s") for what in ("driver", "disk")]


def test_looks_run_side_by_side() -> None:
    both = threading.Barrier(2, timeout=ANSWER_SECONDS)

    def meets() -> Sequence[Line]:
        both.wait()
        return [ok("it", "met")]

    (group,) = look_at_all([Look("a", "one", meets), Look("a", "two", meets)], ANSWER_SECONDS)
    assert list(group.lines) == [ok("it", "met")] * 2


def test_several_looks_may_wait_for_one_result() -> None:
    calls = []
    shared = later(lambda: calls.append(1))

    def looks() -> Sequence[Line]:
        shared.result()
        return [ok("it", "there")]

    look_at_all([Look("a", "one", looks), Look("a", "two", looks)], ANSWER_SECONDS)
    assert calls == [1]

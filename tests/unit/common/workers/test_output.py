"""Output of users' code in the log."""

import logging

import pytest

from penstock.workers.output import MAX_LOGGED_CHARS, OutputLog


@pytest.fixture(autouse=True)
def every_record(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_parts_of_lines_become_lines(caplog: pytest.LogCaptureFixture) -> None:
    output = OutputLog("it")
    for part in (b"one", b" ", b"two", b"\n", b"\n", b"three\nfour\nfi", b"ve"):
        output.write(part)
    assert caplog.messages == ["it wrote: one two", "it wrote: three\nfour"]
    output.rename("another")
    output.write(b"six\n")
    output.flush()
    assert caplog.messages[2:] == ["it wrote: five", "another wrote: six"]
    assert output.tail == "one two\n\nthree\nfour\nfivesix"


def test_characters_that_come_in_parts_or_are_none(caplog: pytest.LogCaptureFixture) -> None:
    output = OutputLog("it")
    output.write("\u00e9".encode()[:1])
    output.write("\u00e9".encode()[1:] + b"\xff\n")
    assert caplog.messages == ["it wrote: \u00e9\ufffd"]


def test_a_line_without_end_is_logged_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    output = OutputLog("it")
    output.write(b"x" * (MAX_LOGGED_CHARS + 1))
    assert len(caplog.messages) == 1
    assert len(output.tail) == MAX_LOGGED_CHARS

"""Frames between a service and its worker processes."""

import msgspec
import pytest

from penstock.workers import frames
from penstock.workers.frames import LENGTH, Message, frame, frame_length


class Text(Message, frozen=True, tag="text"):
    """A message of this test."""

    text: str


def test_a_frame_is_its_length_and_the_message() -> None:
    data = frame(Text("hello"))
    size = frame_length(data[: LENGTH.size])
    assert msgspec.msgpack.decode(data[LENGTH.size :], type=Text) == Text("hello")
    assert size == len(data) - LENGTH.size


def test_a_frame_that_is_too_long_is_neither_sent_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    long = frame(Text("x" * 100))
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 50)
    with pytest.raises(ValueError, match="expected at most 50"):
        frame(Text("x" * 100))
    with pytest.raises(ValueError, match="expected at most 50"):
        frame_length(long[: LENGTH.size])

"""Steps as people number them: one notation for all commands."""

import pytest

from penstock.errors import ConfigError
from penstock.records.step_numbers import parse_steps, shown_steps, spans


def test_steps_are_written_as_they_are_read() -> None:
    texts = ("3:5", "3:", ":5", ":", "7", "7:7")
    assert [parse_steps(text) for text in texts] == [(2, 5), (2, None), (None, 5), (None, None), (6, 7), (6, 7)]
    assert spans([0, 1, 2, 7, 9, 10]) == "1:3, 8, 10:11"
    assert [parse_steps(shown_steps(first, end)) for first, end in ((0, 1), (3, 9))] == [(0, 1), (3, 9)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", "expected A:B, steps A to B"),
        ("1:2:3", "expected A:B, steps A to B"),
        ("0:4", "expected steps from 1 on"),
        ("0", "expected steps from 1 on"),
        ("5:4", "expected A:B with B no less than A"),
    ],
)
def test_what_is_no_range_of_steps_is_named(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"saw {text!r}.*{expected}"):
        parse_steps(text)

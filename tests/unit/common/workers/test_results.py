"""What users' code returned or raised, as plain values."""

import importlib.util
import math
from pathlib import Path

import numpy
import pytest

from penstock.workers.results import MAX_REASON_CHARS, as_number, describe, finite_number, summary


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (True, 1.0), (0.5, 0.5), (numpy.float32(0.5), 0.5), (numpy.array(2), 2.0), (10**400, math.inf)],
)
def test_numbers_of_every_kind(value: object, number: float) -> None:
    assert as_number(value) == number


@pytest.mark.parametrize("value", ["1", None, [1], 1j, numpy.array([1.0])])
def test_what_is_no_number(value: object) -> None:
    assert as_number(value) is None
    with pytest.raises(ValueError, match=f"returned {type(value).__name__}; expected a number"):
        finite_number(value)


@pytest.mark.parametrize("value", [math.nan, -math.inf, 10**400])
def test_what_is_not_finite(value: object) -> None:
    with pytest.raises(ValueError, match="expected a finite number"):
        finite_number(value)


def test_the_place_is_in_the_users_folder_if_the_exception_passed_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import json\n\ndef read(text):\n    return json.loads(text)\n")
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match="Expecting value") as raised:
        module.read("no")
    assert describe(raised.value, __file__, str(tmp_path)).endswith("(mine.py:4)")
    assert "(decoder.py:" in describe(raised.value, __file__)


def test_no_place_in_the_caller_itself() -> None:
    with pytest.raises(ValueError, match="no") as raised:
        raise ValueError("no")
    assert describe(raised.value, __file__) == "ValueError: no"


def test_messages_are_short_and_can_be_packed() -> None:
    assert len(summary(ValueError("x" * 9999))) <= MAX_REASON_CHARS + 3
    assert summary(KeyError()) == "KeyError"
    summary(ValueError("\ud800")).encode()

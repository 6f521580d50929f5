"""What users' code returned or raised, as plain values."""

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import numpy
import pytest

from penstock.workers.results import MAX_REASON_CHARS, as_number, describe, finite_number, summary
from penstock_reward.functions.registry import load
from penstock_reward.processes import child


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


def module_of(path: Path, source: str) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


READS = "import json\n\ndef read(text):\n    return json.loads(text)\n"


def test_the_users_line_is_named_and_the_librarys_that_raised_after_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expecting value") as raised:
        module_of(tmp_path / "mine.py", READS).read("no")
    for folder in (str(tmp_path), ""):
        described = describe(raised.value, __file__, folder)
        assert re.search(r"\(mine\.py:4; raised at json/decoder\.py:\d+\)$", described), described


def test_an_environment_below_the_users_folder_is_none_of_the_users_files(tmp_path: Path) -> None:
    """The folder of a reward is often "." and holds `.venv`."""
    library = module_of(
        tmp_path / ".venv/lib/python3/site-packages/web/client.py", "def get():\n    raise OSError('x')\n"
    )
    mine = module_of(tmp_path / "judges" / "mine.py", "def ask(get):\n    return get()\n")
    with pytest.raises(OSError, match="x") as raised:
        mine.ask(library.get)
    assert describe(raised.value, __file__, str(tmp_path)) == "OSError: x (judges/mine.py:2; raised at web/client.py:2)"
    assert describe(raised.value, __file__) == "OSError: x (mine.py:2; raised at web/client.py:2)"
    with pytest.raises(OSError, match="x") as raised:  # a function that an installed package has
        library.get()
    assert describe(raised.value, __file__, str(tmp_path)) == "OSError: x (web/client.py:2)"


def test_of_a_module_that_is_not_there_no_line_of_penstock_or_python_is_named() -> None:
    with pytest.raises(ModuleNotFoundError) as raised:
        load("nowhere:f")
    raised.value.__traceback__ = raised.value.__traceback__ and raised.value.__traceback__.tb_next  # without this test
    assert describe(raised.value, child.__file__) == "ModuleNotFoundError: No module named 'nowhere'"


def test_no_place_in_the_caller_itself() -> None:
    with pytest.raises(ValueError, match="no") as raised:
        raise ValueError("no")
    assert describe(raised.value, __file__) == "ValueError: no"


def test_messages_are_short_and_can_be_packed() -> None:
    assert len(summary(ValueError("x" * 9999))) <= MAX_REASON_CHARS + 3
    assert summary(KeyError()) == "KeyError"
    summary(ValueError("\ud800")).encode()

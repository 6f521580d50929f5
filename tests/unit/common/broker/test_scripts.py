"""Scripts get their named values in the right order; faults of a header or of a call are named."""

from pathlib import Path
from typing import Any

import pytest

from penstock.broker import dead, launcher, lease, queue, scripts, trainer, worker
from penstock.broker.scripts import Script, script_paths

SCRIPT = """-- KEYS live parts...
-- ARGV token number
-- ARGV tickets(ticket entry)...
-- USES second
--
-- Prose.
return live
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "first.lua").write_text("local first = 1\n")
    (tmp_path / "shared" / "second.lua").write_text("-- USES first\nlocal second = first\n")
    monkeypatch.setattr(scripts, "FOLDER", tmp_path)
    return tmp_path


def make(folder: Path, text: str = SCRIPT) -> Script:
    (folder / "script.lua").write_text(text)
    return Script("script")


def given(**changes: Any) -> dict[str, Any]:
    tickets = [{"entry": "5-0", "ticket": 1}, {"ticket": 2, "entry": b"6-0"}]
    return {"number": 7, "token": "1:a", "tickets": tickets, "parts": ["p", "q"], "live": "l"} | changes


def test_a_call_is_in_the_order_of_the_header(folder: Path) -> None:
    call = make(folder)(**given())
    assert call.keys == ["l", "p", "q"]
    assert call.arguments == ["1:a", 7, 1, "5-0", 2, b"6-0"]


def test_lists_may_be_empty_and_flags_are_numbers(folder: Path) -> None:
    call = make(folder)(**given(parts=[], tickets=[], number=True))
    assert (call.keys, call.arguments) == (["l"], ["1:a", 1])


def test_what_a_script_uses_stands_once_before_it(folder: Path) -> None:
    text = make(folder, SCRIPT.replace("USES second", "USES first second first")).text
    assert [text.count(each) for each in ("local first", "local second", "USES", "KEYS live")] == [1, 1, 0, 0]
    assert text.index("local live") < text.index("local first") < text.index("local second") < text.index("return live")


def test_missing_and_unknown_names_are_named(folder: Path) -> None:
    names = given(lives="l")
    del names["live"]
    with pytest.raises(TypeError, match=r"script\.lua: missing \['live'\], unknown \['lives'\]"):
        make(folder)(**names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": "p"}, "parts: saw 'p', expected a list"),
        ({"token": ["1:a"]}, "token: saw .*, expected text"),
        ({"token": None}, "token: saw None, expected text"),
        ({"number": 1.5}, "number: saw 1.5, expected text"),
        ({"parts": [None]}, "parts: saw None"),
        ({"tickets": [{"ticket": 1}]}, "tickets: saw .*, expected a mapping of ticket, entry"),
        ({"tickets": [(1, "5-0")]}, "tickets: saw .*, expected a mapping of ticket, entry"),
        ({"tickets": [{"ticket": 1, "entry": None}]}, "entry: saw None"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=rf"script\.lua: {message}"):
        make(folder)(**given(**changes))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("-- KEYS parts... live\n-- ARGV\n", "one list, which is the last"),
        ("-- KEYS live, wake\n-- ARGV\n", "expected names"),
        ("-- KEYS live\n-- ARGV tickets(ticket entry)\n", r"expected \.\.\. after a record"),
        ("-- KEYS live\n-- ARGV token live\n", "each name once"),
    ],
)
def test_a_header_that_cannot_be_read_is_refused(folder: Path, header: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder, header)


def test_every_script_is_used_and_says_whether_it_may_be_repeated() -> None:
    modules = (dead, launcher, lease, queue, trainer, worker)
    used = [each for module in modules for each in vars(module).values() if isinstance(each, Script)]
    assert sorted(each.path for each in used) == script_paths()
    assert [each.path for each in used if "-- Repeated" not in each.text] == []

"""What a message says of a path that is not there."""

from pathlib import Path

import pytest

from penstock.absent_path import looked_for


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    for name in ("train.jsonl", "task/words.jsonl", "data/train.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (tmp_path / "above.jsonl").touch()
    monkeypatch.chdir(folder)
    return folder


def test_a_relative_path_is_shown_in_full_with_the_folder_that_it_began_in(here: Path) -> None:
    text = looked_for("nothing.bin")
    assert text == f"looked at {here}/nothing.bin, from {here}, the folder in which the command runs"


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("trian.jsonl", "'train.jsonl'"),
        ("train.json", "'train.jsonl'"),
        ("Train.jsonl", "'train.jsonl'"),
        ("words.jsonl", "'task/words.jsonl'"),
        ("above.jsonl", "'../above.jsonl'"),
        ("dat/train.jsonl", "'data/train.jsonl' or 'train.jsonl'"),
    ],
)
def test_names_that_are_there_instead(path: str, near: str) -> None:
    assert looked_for(path).endswith(f"; did you mean {near}?")


def test_a_folder_that_is_not_there_is_named(here: Path) -> None:
    assert f"; there is no {here}/elsewhere" in looked_for("elsewhere/deep/nothing.bin")
    assert looked_for(f"{here}/trian.jsonl") == (f"looked at {here}/trian.jsonl; did you mean '{here}/train.jsonl'?")


def test_no_path_is_an_error() -> None:
    assert "looked" in looked_for("a\0b")
    assert "looked" in looked_for("")

"""Files of lines that grow, are cut and are replaced while they are read."""

from pathlib import Path

import pytest

from penstock.view import lines
from penstock.view.lines import LineIndex, lines_before


def new(index: LineIndex) -> tuple[bool, list[bytes]]:
    replaced, found = index.new_lines()
    return replaced, list(found)


def test_each_line_is_new_once_and_an_unfinished_one_is_none_yet(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    index = LineIndex(path)
    assert new(index) == (False, [])
    path.write_bytes(b"one\ntw")
    assert new(index) == (False, [b"one\n"])
    with path.open("ab") as file:
        file.write(b"o\nthree\n")
    assert new(index) == (False, [b"two\n", b"three\n"])
    assert [index.read(number) for number in range(len(index))] == [b"one\n", b"two\n", b"three\n"]


@pytest.mark.parametrize("content", [b"one\n", b"one\nTWO\nthree\nfour\n", b""], ids=["cut", "written again", "empty"])
def test_a_file_that_was_cut_or_written_again_is_read_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n")
    index = LineIndex(path)
    new(index)
    path.write_bytes(content)
    assert new(index) == (True, content.splitlines(keepends=True))
    assert len(index) == content.count(b"\n")


def test_a_replaced_file_is_read_anew_even_if_it_is_longer(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n")
    index = LineIndex(path)
    new(index)
    (tmp_path / "other").write_bytes(b"one\ntwo\nthree\n")
    (tmp_path / "other").replace(path)
    assert new(index) == (True, [b"one\n", b"two\n", b"three\n"])


@pytest.mark.parametrize("block", [3, 7, 2**20])
def test_lines_are_read_backwards_whatever_the_size_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    path = tmp_path / "lines"
    expected = [b"one\n", b"\n", b"a longer line\n", b"four\n"]
    path.write_bytes(b"".join(expected) + b"unfinished")
    found = list(lines_before(path, None))
    assert [line for _, line in found] == expected[::-1]
    assert [path.read_bytes()[start:][: len(line)] for start, line in found] == expected[::-1]
    middle = found[1][0]
    assert [line for _, line in lines_before(path, middle)] == [b"\n", b"one\n"]


def test_no_line_is_read_of_a_file_that_does_not_exist(tmp_path: Path) -> None:
    assert list(lines_before(tmp_path / "none", None)) == []

"""Lines that one process appends while others read them."""

import math
import os
from contextlib import closing
from pathlib import Path

from penstock.records.lines import Tail, as_written, complete_lines, cut_unfinished_line


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_line_that_is_being_written_is_none_yet(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    assert list(complete_lines(path)) == []
    append(path, '{"step": 0}\n{"st')
    lines = complete_lines(path)
    assert next(lines) == b'{"step": 0}\n'
    assert list(lines) == []
    append(path, 'ep": 1}\n')
    assert [as_written(line) for line in complete_lines(path)] == [{"step": 0}, {"step": 1}]


def test_half_a_line_is_none_though_its_end_comes_while_the_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    append(path, '{"st')
    lines = complete_lines(path)
    assert list(lines) == []
    append(path, 'ep": 1}\n')
    assert list(lines) == []  # and never `ep": 1}`
    with closing(Tail(path)) as tail:
        assert tail.new() == [{"step": 1}]


def test_only_the_writer_removes_what_a_crash_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    cut_unfinished_line(path)
    assert not path.exists()
    append(path, '{"step": 0}\n{"step": 1, "rew')
    before = path.read_text()
    list(complete_lines(path))
    assert path.read_text() == before
    cut_unfinished_line(path)
    assert path.read_text() == '{"step": 0}\n'


def test_what_is_no_number_is_read() -> None:
    line = as_written(b'{"loss": NaN, "grad_norm": Infinity, "statistics": {"x": -Infinity}}\n')
    assert math.isnan(line["loss"])
    assert (line["grad_norm"], line["statistics"]) == (math.inf, {"x": -math.inf})


def test_a_tail_returns_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with closing(Tail(path)) as tail:
        assert tail.new() == []
        append(path, '{"step": 0}\n{"step"')
        assert tail.new() == [{"step": 0}]
        append(path, ": 1}\n")
        assert (tail.new(), tail.new()) == ([{"step": 1}], [])


def test_a_tail_returns_steps_that_were_trained_again_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    append(path, '{"step": 0, "reward": 0.1}\n{"step": 1, "reward": 0.2}\n')
    with closing(Tail(path)) as tail:
        assert len(tail.new()) == 2
        kept = tmp_path / "kept"
        kept.write_text('{"step": 0, "reward": 0.1}\n{"step": 1, "reward": 0.9}\n')
        kept.replace(path)
        assert tail.new() == [{"step": 1, "reward": 0.9}]
        path.unlink()
        assert tail.new() == []
        append(path, '{"step": 2}\n')
        assert tail.new() == [{"step": 2}]
        assert len(os.listdir(tmp_path)) == 1

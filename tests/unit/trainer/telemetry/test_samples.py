"""`samples.jsonl`: each step once, whatever ended the trainer, and read back without the file in memory."""

import tracemalloc
from pathlib import Path

import pytest
from msgspec import structs

from penstock.errors import PenstockError
from penstock.records.samples import SampleLine
from penstock_trainer.telemetry.samples import SampleFile
from tests.small_disk import full_disk
from tests.unit.trainer.telemetry.tracked_life import SAMPLE


def lines(step: int, count: int = 2) -> list[SampleLine]:
    return [structs.replace(SAMPLE, step=step, index=index) for index in range(count)]


def test_a_step_is_written_once_and_found_again_by_the_next_life(tmp_path: Path) -> None:
    first = SampleFile(tmp_path)
    for step in (0, 2, 5):
        first.add(step, lines(step, count=step + 1))
    first.add(3, [])
    second = SampleFile(tmp_path)
    second.add(5, lines(5))
    second.add(6, lines(6))
    for file in (second, SampleFile(tmp_path)):
        assert [len(file.of(step)) for step in range(8)] == [1, 0, 3, 0, 0, 6, 2, 0]
        assert file.of(2) == lines(2, 3)


def test_steps_that_are_reported_anew_are_forgotten_with_a_line_that_a_crash_cut_off(tmp_path: Path) -> None:
    first = SampleFile(tmp_path)
    for step in range(4):
        first.add(step, lines(step))
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    second = SampleFile(tmp_path)
    assert [len(second.of(step)) for step in range(4)] == [2, 2, 2, 1]
    second.forget_from(2)
    second.forget_from(9)
    second.add(2, lines(2, 3))
    assert [len(second.of(step)) for step in range(4)] == [2, 2, 3, 0]
    assert [len(SampleFile(tmp_path).of(step)) for step in range(4)] == [2, 2, 3, 0]


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    file = SampleFile(tmp_path)
    text = "x" * 5000
    tracemalloc.start()
    for step in range(300):
        file.add(step, [structs.replace(SAMPLE, step=step, completion=text)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300_000 < (tmp_path / "samples.jsonl").stat().st_size


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(PenstockError, match=r"samples\.jsonl cannot be written .* run\.root"):
        SampleFile(tmp_path).add(0, lines(0))

"""Trainer minus sampler of each token: shown where it was recorded for these very groups, and else "not recorded"."""

import struct
from pathlib import Path

import msgspec
import pytest

from penstock.contracts.ledger import StepRecord, decode_record
from penstock.contracts.log_ratios import LogRatiosFile
from penstock.records import RunRecords
from penstock.view.run import RunView
from tests.unit.common.view.conftest import Made


def test_each_token_has_what_was_recorded_of_it(made: Made) -> None:
    page = made.view.tokens(1, 0, 0, 0, 100)
    assert page["log_ratios"] == [None] * 4 + [0.0, -0.5, None, 0.25]
    assert page["largest_log_ratio"] == {"token": 5, "value": -0.5}
    assert made.view.tokens(1, 0, 0, 5, 2)["log_ratios"] == [-0.5, None]
    assert made.view.tokens(1, 0, 0, 7, 1)["largest_log_ratio"] == {"token": 5, "value": -0.5}
    not_computed = made.view.tokens(1, 0, 2, 0, 100)
    assert (set(not_computed["log_ratios"]), not_computed["largest_log_ratio"]) == ({None}, None)
    assert (page["log_ratios_missing"], not_computed["log_ratios_missing"]) == ("", "")


def test_a_step_and_a_group_name_the_largest(made: Made) -> None:
    groups = msgspec.to_builtins(made.view.step(1)["groups"])
    largest = {"value": -0.5, "completion": 0, "place": 1}
    assert [each["largest_log_ratio"] for each in groups] == [largest, None, None]
    found = msgspec.to_builtins(made.view.group(1, 0, None)["largest_log_ratios"])
    assert found == [largest, {"value": 0.125, "completion": 1, "place": 0}, None, None]


def test_an_episodes_values_are_at_its_sampled_nodes(made: Made) -> None:
    found = made.view.tokens(2, 1, 0, 0, 100)
    sampled = [logprob is not None for logprob in found["logprobs"]]
    values = [number / 8 for number in range(sum(sampled))]
    record(made, 2, [[[]] * 4, [values, []]])
    page = fresh(made).tokens(2, 1, 0, 0, 100)
    assert [value is not None for value in page["log_ratios"]] == sampled
    assert [value for value in page["log_ratios"] if value is not None] == values


def test_a_step_without_its_file_says_so_and_shows_the_rest(made: Made) -> None:
    step, page = made.view.step(2), made.view.tokens(2, 0, 0, 0, 100)
    assert "there is no 00000001.1.log_ratios" in step["log_ratios_missing"]
    assert [each["largest_log_ratio"] for each in step["groups"]] == [None, None]
    assert made.view.group(2, 0, None)["largest_log_ratios"] == []
    assert (set(page["log_ratios"]), page["log_ratios_missing"]) == ({None}, step["log_ratios_missing"])
    assert page["versions"][4:] == [0, 0, 0, 1, 1, 1]


def test_a_file_that_is_written_later_is_found(made: Made) -> None:
    assert made.view.step(2)["log_ratios_missing"]
    record(made, 2, [[[0.5] * 6, [], [], []], [[], []]])
    assert made.view.step(2)["log_ratios_missing"] == ""
    assert made.view.tokens(2, 0, 0, 0, 100)["log_ratios"][4:] == [0.5] * 6


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-3], "cannot be read"),
        (lambda data: b"", "cannot be read"),
        (lambda data: data + b"0" * 2**21, "is larger"),
        (lambda data: changed(data, digest="0" * 16), "is of a step file with digest 0000000000000000"),
        (lambda data: changed(data, groups=((b"",),)), "has other numbers of tokens"),
        (lambda data: changed(data, groups=((b"12", b"", b"", b""), (b"",) * 4, (b"",) * 4)), "has other numbers"),
    ],
)
def test_a_file_that_is_not_of_these_groups_is_not_shown(made: Made, damage: object, words: str) -> None:
    path = made.run.folder / "steps" / "00000000.1.log_ratios"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    view = fresh(made)
    assert words in view.step(1)["log_ratios_missing"]
    assert set(view.tokens(1, 0, 0, 0, 100)["log_ratios"]) == {None}


def changed(data: bytes, **values: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(msgspec.msgpack.decode(data, type=LogRatiosFile), **values))


def record(made: Made, step: int, values: list[list[list[float]]]) -> None:
    """Write the log-ratios of a step that lacks them."""
    path = made.run.folder / "steps" / f"{step - 1:08d}.1.log_ratios"
    rows = tuple(tuple(struct.pack(f"<{len(each)}e", *each) for each in row) for row in values)
    digest = next(each.digest for each in records(made.run.folder) if each.step == step - 1)
    path.write_bytes(msgspec.msgpack.encode(LogRatiosFile(step - 1, digest, rows)))


def records(folder: Path) -> list[StepRecord]:
    lines = (folder / "steps" / "ledger.jsonl").read_bytes().splitlines()
    return [found for line in lines if isinstance(found := decode_record(line), StepRecord)]


def fresh(made: Made) -> RunView:
    return RunView("again", RunRecords(made.run.folder))

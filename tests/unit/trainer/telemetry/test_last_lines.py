"""`dropped.jsonl`: what is kept of groups that no step trains, however many there are."""

import json
from pathlib import Path

from msgspec import structs

from penstock.records.run import RunRecords
from penstock.records.samples import DroppedLine
from penstock_trainer.telemetry.last_lines import MOST_LINES, LastLines
from tests.unit.trainer.telemetry.tracked_life import SAMPLE

LINE = DroppedLine(**structs.asdict(structs.replace(SAMPLE, reward=None, failure="gone")), dropped="reward_failed")


def test_lines_are_there_at_once_and_a_line_that_a_crash_cut_off_is_not(tmp_path: Path) -> None:
    LastLines(tmp_path / "dropped.jsonl").add([LINE, structs.replace(LINE, index=2)])
    path = tmp_path / "dropped.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    LastLines(tmp_path / "dropped.jsonl").add([])
    [line] = RunRecords(tmp_path).dropped()
    assert (line["dropped"], line["failure"], line["reward"]) == ("reward_failed", "gone", None)


def test_a_service_that_stays_down_fills_no_disk(tmp_path: Path) -> None:
    file = LastLines(tmp_path / "dropped.jsonl")
    for ticket in range(3 * MOST_LINES):
        if ticket == MOST_LINES:
            file = LastLines(tmp_path / "dropped.jsonl")  # a later life
        file.add([structs.replace(LINE, ticket=ticket)])
    tickets = [json.loads(line)["ticket"] for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert MOST_LINES <= len(tickets) < 2 * MOST_LINES
    assert tickets == list(range(tickets[0], 3 * MOST_LINES))

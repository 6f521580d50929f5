"""The journal equals the ledger, after restarts, lost queues and torn lines."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.contracts import DropReason, PolicyIdentity
from penstock.contracts.ledger import (
    CheckpointRecord,
    DropRecord,
    LedgerState,
    Record,
    RunRecord,
    StepRecord,
    WeightsRecord,
    archived,
    replay,
)
from penstock.errors import DataError
from penstock.records.ledger_files import all_records
from penstock_trainer.checkpoints.journal import Journal

RUN = RunRecord("d" * 16, 100, 8, 4, 0)


def life(lease: int, *steps: int) -> list[Record]:
    """The records of a trainer with this lease: each step, then the weights after it."""
    return [
        record
        for step in steps
        for record in (
            StepRecord(step, (step,), f"{step:08d}.{lease}.pack", "e" * 16),
            WeightsRecord(PolicyIdentity(step + 1, f"{lease}" * 16), step + 1),
        )
    ]


START: list[Record] = [RUN, WeightsRecord(PolicyIdentity(0, "a" * 16), 0)]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "steps")


def test_it_gives_back_what_the_ledger_says_of_steps_and_weights(journal: Journal) -> None:
    assert not journal.exists
    journal.begin(replay(START))
    journal.append(*life(1, 0))
    journal.append(*life(1, 1))
    journal.append(CheckpointRecord(2, "00000002.1"))
    expected = replay([*START, *life(1, 0, 1), CheckpointRecord(2, "00000002.1")])
    assert journal.read() == expected
    journal.begin(expected)
    assert journal.read() == expected


def test_tickets_that_were_dropped_are_in_it(journal: Journal) -> None:
    failed = DropRecord(3, DropReason.REWARD_FAILED, num_completions=4, failures={"timeout": 3})
    journal.begin(LedgerState(run=RUN, drops={3: failed}))
    journal.append(DropRecord(5, DropReason.STALE), durable=False)
    assert journal.read() == LedgerState(run=RUN, drops={3: failed, 5: DropRecord(5, DropReason.STALE)})


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_what_the_ledger_lost_or_a_branch_left_behind_is_not_in_it(journal: Journal, kept: int) -> None:
    """A later life starts from a ledger that is behind the journal, and trains other steps with the same numbers."""
    journal.begin(replay(START))
    journal.append(*life(1, 0, 1, 2))
    ledger = [*START, *life(1, *range(kept))]
    journal.begin(replay(ledger))
    journal.append(*life(2, kept))
    assert journal.read() == replay([*ledger, *life(2, kept)])
    assert [record.file for record in journal.read().steps][-1] == f"{kept:08d}.2.pack"


def test_a_line_that_a_crash_cut_off_is_left_out(journal: Journal) -> None:
    journal.begin(replay([*START, *life(1, 0)]))
    data = journal.path.read_bytes()
    journal.path.write_bytes(data + b'{"record":"step","st')
    assert journal.read() == replay([*START, *life(1, 0)])


@pytest.mark.parametrize("data", [b"no json\n", b'{"record":"other"}\n', b"\xff\n"])
def test_one_that_is_damaged_or_absent_is_named(journal: Journal, data: bytes) -> None:
    with pytest.raises(DataError, match=r"ledger\.jsonl cannot be read"):
        journal.read()
    journal.begin(LedgerState())
    journal.path.write_bytes(data)
    with pytest.raises(DataError, match=r"ledger\.jsonl is damaged"):
        journal.read()


RECORDS: list[Record] = [
    *START,
    *life(1, 0, 1),
    CheckpointRecord(2, "00000002.1"),
    DropRecord(3, DropReason.STALE),
    *life(1, 2),
    DropRecord(9, DropReason.POISON, "no group"),
    *life(1, 4, 5),
    CheckpointRecord(6, "00000006.1"),
]
CHECKPOINTS = [each for each in RECORDS if isinstance(each, CheckpointRecord)]


@given(st.lists(st.integers(1, len(RECORDS)), max_size=3).map(sorted), st.sets(st.sampled_from(CHECKPOINTS)))
def test_what_is_archived_is_not_lost_to_the_history_nor_to_the_sums(
    cuts: list[int], there: set[CheckpointRecord]
) -> None:
    """However often a ledger is shortened, and whatever the end of a process left behind what counts."""
    with TemporaryDirectory() as name:
        journal = Journal(Path(name) / "steps")
        records, expected, num_cut = list(RECORDS), replay(RECORDS), 0
        for cut in cuts:
            before = replay(records).archived
            num_bytes = before.num_bytes if before else 0
            journal.archive([CheckpointRecord(99, "of a process that ended here")], num_bytes)
            oldest = RECORDS[num_cut:cut]
            head = records[: len(records) - len(RECORDS) + cut]
            records[: len(head)] = [archived(head, journal.archive(oldest, num_bytes), exists=there)]
            num_cut = cut
        ledger = replay(records)
        assert ledger.run == RUN
        assert (ledger.ended, ledger.num_dropped) == (expected.ended, expected.num_dropped)
        assert (ledger.num_trained, ledger.num_steps) == (expected.num_trained, expected.num_steps)
        assert ledger.not_ended(12) == [6, 7, 8, 10, 11]
        assert {*expected.checkpoints} >= {*ledger.checkpoints} >= {*expected.checkpoints} & there
        journal.begin(ledger)
        assert journal.read() == ledger
        history = journal.history()
        assert history == expected
        assert replay(all_records(journal.path.parent)) == history


@pytest.mark.parametrize("change", [-1, -40, None])
def test_an_archive_that_is_not_what_the_ledger_says_is_named(journal: Journal, change: int | None) -> None:
    num_bytes = journal.archive(RECORDS[:4], 0)
    path = journal.path.with_name("archive.jsonl")
    journal.begin(replay([archived(RECORDS[:4], num_bytes, exists=()), *RECORDS[4:]]))
    path.write_bytes(path.read_bytes()[:change]) if change else path.unlink()
    with pytest.raises(DataError, match=r"archive\.jsonl"):
        journal.history()
    with pytest.raises(DataError, match=r"archive\.jsonl has \d+ bytes"):
        journal.archive([], num_bytes)

"""The ledger: records survive their encoding, and a replay of them gives the state."""

import msgspec
import pytest

from penstock.contracts import DropReason, PolicyIdentity
from penstock.contracts.ledger import (
    CheckpointRecord,
    DropRecord,
    LedgerState,
    Record,
    RunRecord,
    StepRecord,
    WeightsRecord,
    decode_record,
    encode_record,
    replay,
)

RUN = RunRecord("d" * 16, 100, 8, 4, 0)
FIRST, SECOND = PolicyIdentity(0, "a" * 16), PolicyIdentity(1, "b" * 16)
RECORDS: list[Record] = [
    RUN,
    WeightsRecord(FIRST, 0),
    StepRecord(0, (0, 2), "00000000.1.pack", "e" * 16),
    DropRecord(1, DropReason.POISON, why="no ScoredHeader"),
    WeightsRecord(SECOND, 1),
    StepRecord(1, (3,), "00000001.1.pack", "f" * 16),
    StepRecord(2, (4,), "00000002.1.pack", "f" * 16, version=1, max_lag=4),
    WeightsRecord(SECOND, 2, changed=False),
    CheckpointRecord(2, "00000002.1"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_survives_its_encoding(record: Record) -> None:
    assert decode_record(encode_record(record)) == record


def test_a_step_of_an_older_ledger_has_no_version() -> None:
    old = b'{"record":"step","step":3,"tickets":[1],"file":"f","digest":"d"}'
    assert decode_record(old) == StepRecord(3, (1,), "f", "d", version=None, max_lag=None)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"record": "other"}', b'{"record": "drop", "ticket": "x"}'])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_record(data)


@pytest.mark.parametrize("reason", ["stale", "degenerate", "reward_failed", "poison"])
def test_a_drop_is_written_as_ever(reason: str) -> None:
    data = f'{{"record":"drop","ticket":7,"reason":"{reason}"}}'.encode()
    assert decode_record(data) == DropRecord(7, DropReason(reason))
    assert encode_record(decode_record(data)) == data


def test_an_unknown_reason_of_a_drop_is_named() -> None:
    with pytest.raises(msgspec.DecodeError, match="Invalid enum value 'bored'"):
        decode_record(b'{"record":"drop","ticket":7,"reason":"bored"}')


def test_replay_says_what_happened() -> None:
    state = replay(RECORDS)
    assert state.run == RUN
    assert state.trained == {0: 0, 2: 0, 3: 1, 4: 2}
    assert (state.dropped, state.drops[1].why) == ({1: "poison"}, "no ScoredHeader")
    assert state.policies == {0: FIRST, 1: SECOND}
    assert [(record.step, record.version, record.max_lag) for record in state.steps] == [
        (0, None, None),
        (1, None, None),
        (2, 1, 4),
    ]
    assert state.checkpoints == [CheckpointRecord(2, "00000002.1")]


def test_the_first_run_record_counts() -> None:
    assert replay([RUN, msgspec.structs.replace(RUN, seed=1)]).run == RUN
    assert replay([]) == LedgerState()

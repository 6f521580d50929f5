"""What services say of themselves: the bytes are those of every release, and an unknown word is refused by name."""

import msgspec
import pytest

from penstock.contracts import PolicyIdentity, ServerState, ServiceKind
from penstock.contracts.services import ServiceRecord

RECORDS = [
    (
        ServiceRecord(
            ServiceKind.ROLLOUT, "r-1", "http://h:1", 7, "serving", PolicyIdentity(3, "abcdef0123456789"), "sglang 0.5"
        ),
        b'{"kind":"rollout","name":"r-1","url":"http://h:1","pid":7,"state":"serving",'
        b'"policy":{"number":3,"digest":"abcdef0123456789"},"engine":"sglang 0.5"}',
        ServerState.SERVING,
    ),
    (
        ServiceRecord(ServiceKind.REWARD, "w", "http://h:2", 8, "breaker open: f"),
        b'{"kind":"reward","name":"w","url":"http://h:2","pid":8,"state":"breaker open: f","policy":null,"engine":""}',
        None,
    ),
]


@pytest.mark.parametrize(("record", "data", "state"), RECORDS)
def test_a_record_is_written_as_ever(record: ServiceRecord, data: bytes, state: ServerState | None) -> None:
    assert msgspec.json.encode(record) == data
    assert msgspec.json.decode(data, type=ServiceRecord) == record
    assert record.server_state is state


@pytest.mark.parametrize(
    ("kind", "state", "named"),
    [
        ("engine", "serving", "Invalid enum value 'engine'"),
        ("rollout", "asleep", "'asleep' is not a valid ServerState"),
    ],
)
def test_an_unknown_kind_or_state_is_named(kind: str, state: str, named: str) -> None:
    data = msgspec.json.encode({"kind": kind, "name": "n", "url": "u", "pid": 1, "state": state})
    with pytest.raises(msgspec.ValidationError, match=named):
        msgspec.json.decode(data, type=ServiceRecord)

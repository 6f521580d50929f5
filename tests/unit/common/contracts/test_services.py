"""Messages about services and weights: their bytes are the same in every release; an unknown value is named."""

import json
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from penstock.contracts import MalformedMessageError, PolicyIdentity, ServerState, ServiceKind, from_body, to_body
from penstock.contracts.canary import Canary
from penstock.contracts.services import (
    Announcement,
    ServedWeights,
    ServiceRecord,
    announced_fields,
    push_body,
    read_announced,
    read_push,
    read_snapshot,
    snapshot_body,
    version_body,
)
from penstock.contracts.weight_sources import (
    CollectiveSource,
    DiskSource,
    LeftParent,
    Parent,
    RelaySource,
    SharedBucket,
    Source,
    TensorSource,
    TensorSpec,
)
from penstock.errors import WeightsError

IDENTITY = PolicyIdentity(3, "abcdef0123456789")
PLAIN = Announcement(IDENTITY, "/w/3.7", 7)
PROBED = Announcement(IDENTITY, "/w/3.7", 7, Canary((4, 5), (-1.5,), 0.002))
CANARY = '{"token_ids":[4,5],"logprobs":[-1.5],"tolerance":0.002}'
HELD = {b"number": b"3", b"digest": b"abcdef0123456789", b"path": b"/w/3.7", b"lease": b"7"}
SPEC = TensorSpec("w", "bfloat16", (2, 3))
ENGINE: dict[str, Any] = {
    "engine": "sglang 0.5",
    "engine_starts": 2,
    "engine_device": "cuda",
    "engine_num_ranks": 1,
}

RECORDS = [
    (
        ServiceRecord(
            ServiceKind.ROLLOUT, "r-1", "http://h:1", 7, "serving", PolicyIdentity(3, "abcdef0123456789"), "sglang 0.5"
        ),
        b'{"kind":"rollout","name":"r-1","url":"http://h:1","pid":7,"state":"serving",'
        b'"policy":{"number":3,"digest":"abcdef0123456789"},"engine":"sglang 0.5","open_breakers":{}}',
        ServerState.SERVING,
    ),
    (
        ServiceRecord(ServiceKind.REWARD, "w", "http://h:2", 8, "breaker open: f", open_breakers={"f": "3 failures"}),
        b'{"kind":"reward","name":"w","url":"http://h:2","pid":8,"state":"breaker open: f","policy":null,"engine":"",'
        b'"open_breakers":{"f":"3 failures"}}',
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
        ("rollout", "dreaming", "'dreaming' is not a valid ServerState"),
    ],
)
def test_an_unknown_kind_or_state_is_named(kind: str, state: str, named: str) -> None:
    data = msgspec.json.encode({"kind": kind, "name": "n", "url": "u", "pid": 1, "state": state})
    with pytest.raises(msgspec.ValidationError, match=named):
        msgspec.json.decode(data, type=ServiceRecord)


def as_json(body: dict[str, Any]) -> str:
    return json.dumps(body, separators=(",", ":"))


def test_a_version_that_servers_relay_names_its_list() -> None:
    relayed = replace(PROBED, chunks="0011223344556677")
    source = RelaySource((Parent("s1", "http://10.0.0.1:7"), Parent("trainer-1", "http://[::1]:8")))
    assert read_push(3, push_body(relayed, source)) == (relayed, source)
    held = {name.encode(): str(value).encode() for name, value in announced_fields(relayed).items()}
    assert read_announced({**held, b"canary": CANARY.encode()}) == relayed
    answer = ServedWeights(3, "d", 0.1, ServerState.SERVING, "", 1, "cpu", 1, (LeftParent("s1", "slow", "seen"),))
    assert from_body(msgspec.json.encode(to_body(answer)), ServedWeights) == answer


@pytest.mark.parametrize("url", ["ftp://10.0.0.1", "http://10.0.0.1 /x", "file:///etc/passwd", ""])
def test_a_parent_is_a_service(url: str) -> None:
    body = push_body(PLAIN, RelaySource((Parent("s1", url),)))
    with pytest.raises(WeightsError, match=r"source\.parents"):
        read_push(3, body)


@pytest.mark.parametrize(("announcement", "canary"), [(PLAIN, b"null"), (PROBED, CANARY.encode())])
def test_what_redis_holds_is_as_ever(announcement: Announcement, canary: bytes) -> None:
    written = announced_fields(announcement)
    expected = {"number": 3, "digest": "abcdef0123456789", "path": "/w/3.7", "lease": 7, "canary": canary, "chunks": ""}
    assert written == expected
    assert list(written) == list(expected)  # in the order that the script expects
    assert read_announced({**HELD, b"canary": canary}) == announcement


def test_a_version_of_a_trainer_without_canaries_is_read() -> None:
    assert read_announced(HELD) == PLAIN


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (DiskSource(), '{"transport":"disk"}'),
        (
            CollectiveSource("g", ((SPEC,),)),
            '{"transport":"nccl","group":"g","buckets":[[{"name":"w","dtype":"bfloat16","shape":[2,3]}]]}',
        ),
        (
            TensorSource("/m", (SharedBucket("/h", 12, (SPEC,)),)),
            '{"transport":"tensor","manager":"/m","buckets":[{"handle":"/h","num_bytes":12,"tensors":'
            '[{"name":"w","dtype":"bfloat16","shape":[2,3]}]}]}',
        ),
    ],
)
def test_the_body_of_a_push_is_as_ever(source: Source, text: str) -> None:
    for announcement, canary in ((PLAIN, "null"), (PROBED, CANARY)):
        body = push_body(announcement, source)
        assert as_json(body) == (
            f'{{"digest":"abcdef0123456789","path":"/w/3.7","lease":7,"source":{text},"canary":{canary}}}'
        )
        assert read_push(3, json.loads(as_json(body))) == (announcement, source)


def test_a_push_that_says_no_more_is_of_files() -> None:
    body = {"digest": "abcdef0123456789", "path": "/w/3.7", "lease": 7}
    assert read_push(3, body) == (PLAIN, DiskSource())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"digest": "ABC"}, r"\$\.digest"),
        ({"typo": 1}, "unknown field `typo`"),
        ({"source": {"transport": "pigeon"}}, "'pigeon'"),
        ({"canary": {"token_ids": [1, 2], "logprobs": [], "tolerance": 0.1}}, "one less"),
        ({"canary": {"token_ids": [1, 2]}}, r"\$\.canary"),
    ],
)
def test_a_push_that_this_release_does_not_know_is_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=f"the body of a push is .*{named}.*must be of one release"):
        read_push(3, {"digest": "abcdef0123456789", "path": "/w/3.7", "lease": 7, **wrong})


def test_a_snapshot_is_answered_as_ever() -> None:
    for files, canary in ((PLAIN, "null"), (PROBED, CANARY)):
        text = as_json(snapshot_body(files))
        assert text == (
            f'{{"policy_version":3,"checksum":"abcdef0123456789","path":"/w/3.7","lease":7,"canary":{canary}}}'
        )
        assert read_snapshot(text.encode()) == files
    with pytest.raises(MalformedMessageError, match="`policy_version`"):
        read_snapshot(b'{"hello":"world"}')


def test_what_is_served_is_answered_as_ever() -> None:
    served = ServedWeights(**version_body(IDENTITY), paused_seconds=0.25, state=ServerState.SERVING, **ENGINE)
    text = (
        '{"policy_version":3,"checksum":"abcdef0123456789","paused_seconds":0.25,"state":"serving",'
        '"engine":"sglang 0.5","engine_starts":2,"engine_device":"cuda","engine_num_ranks":1}'
    )
    assert as_json(to_body(served)) == text
    assert from_body(text.encode(), ServedWeights) == served
    assert from_body(text.replace("{", '{"later":1,', 1).encode(), ServedWeights).identity == IDENTITY
    before = ServedWeights(**version_body(None), paused_seconds=0.0, state=ServerState.WAITING, **ENGINE)
    assert as_json(to_body(before)).startswith('{"policy_version":null,"checksum":null,')
    assert before.identity is None


@pytest.mark.parametrize("data", [b"hello", b"[1]", b'{"policy_version":3}', b"\xff"])
def test_an_answer_that_is_none_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        from_body(data, ServedWeights)

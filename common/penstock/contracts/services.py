"""Records of services and of the weights that they serve, in every form that Redis and HTTP need.

Owns these forms. Invariant: the program names a pushed version by its `PolicyIdentity`; only this module spells it
otherwise:

    Redis, `policy`            number, digest, path, lease, canary, chunks           announced_fields, read_announced
    PUT /v1/weights/{number}   digest, path, lease, source, canary, chunks           push_body, read_push
    POST /v1/snapshot answers  policy_version, checksum, path, lease, canary         snapshot_body, read_snapshot
    a rollout server answers   policy_version, checksum, paused_seconds, state, ...  ServedWeights
    the trainer answers        policy_version, checksum                              version_body
    POST /v1/sleep             lease, number                                         Turn
    POST /v1/weights/doubt     lease, why                                            Doubt
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from penstock.contracts import Contract, PolicyIdentity, ServerState, ServiceKind, from_body, to_body
from penstock.contracts.canary import Canary
from penstock.contracts.weight_sources import DiskSource, LeftParent, Number, Source, read_body


class ServiceRecord(Contract, frozen=True):
    """One running service as the others see it. state: a `ServerState` of a rollout server, free text of others.

    open_breakers: of a reward service, why each is open, by its function.
    """

    kind: ServiceKind
    name: str
    url: str
    pid: int
    state: str
    policy: PolicyIdentity | None = None
    engine: str = ""
    open_breakers: dict[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind is ServiceKind.ROLLOUT:
            ServerState(self.state)  # ValueError names an unknown one

    @property
    def server_state(self) -> ServerState | None:
        """The state of a rollout server; None for another service."""
        return ServerState(self.state) if self.kind is ServiceKind.ROLLOUT else None


class Announcement(Contract, frozen=True):
    """The version that generates all new work.

    `path` holds its staged weights; `canary`: the log-probabilities that a server must reproduce after it loads them;
    None: no check. `chunks`: the digest of its list of chunks; empty if servers do not relay it.

    >>> announcement = Announcement(PolicyIdentity(3, "9f86d081884c7d65"), "/dev/shm/penstock/demo/3.1", lease=1)
    >>> print(announcement.identity)
    3-9f86d081
    >>> body = push_body(announcement, DiskSource())
    >>> body["digest"], body["source"]
    ('9f86d081884c7d65', {'transport': 'disk'})
    >>> read_push(3, body) == (announcement, DiskSource())
    True
    """

    identity: PolicyIdentity
    path: str
    lease: int
    canary: Canary | None = None
    chunks: str = ""


def announced_fields(announcement: Announcement) -> dict[str, str | int | bytes]:
    """The hash in Redis, in the order in which the script that writes it takes the values."""
    return {
        "number": announcement.identity.number,
        "digest": announcement.identity.digest,
        "path": announcement.path,
        "lease": announcement.lease,
        "canary": msgspec.json.encode(announcement.canary),
        "chunks": announcement.chunks,
    }


def read_announced(fields: Mapping[bytes, bytes]) -> Announcement:
    """The inverse, from Redis's answer."""
    return Announcement(
        PolicyIdentity(int(fields[b"number"]), fields[b"digest"].decode()),
        fields[b"path"].decode(),
        int(fields[b"lease"]),
        msgspec.json.decode(fields.get(b"canary", b"null"), type=Canary | None),
        fields.get(b"chunks", b"").decode(),
    )


class _Push(Contract, frozen=True):
    digest: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
    lease: Number
    source: Source = DiskSource()
    canary: Canary | None = None
    chunks: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")] | msgspec.UnsetType = msgspec.UNSET


def push_body(announcement: Announcement, source: Source) -> dict[str, Any]:
    """The body of a push: the version without its number, which is in the path, and the source of its bytes."""
    digest = announcement.identity.digest
    chunks = announcement.chunks or msgspec.UNSET
    push = _Push(digest, announcement.path, announcement.lease, source, announcement.canary, chunks)
    return to_body(push)


def read_push(number: int, body: dict[str, Any]) -> tuple[Announcement, Source]:
    """The inverse; WeightsError names the first field that does not fit this release."""
    push: _Push = read_body(body, _Push, "body of a push")
    identity = PolicyIdentity(number, push.digest)
    chunks = "" if push.chunks is msgspec.UNSET else push.chunks
    return Announcement(identity, push.path, push.lease, push.canary, chunks), push.source


def version_body(identity: PolicyIdentity | None) -> dict[str, Any]:
    """A version, as answers name it."""
    if identity is None:
        return {"policy_version": None, "checksum": None}
    return {"policy_version": identity.number, "checksum": identity.digest}


class _Snapshot(Contract, frozen=True, forbid_unknown_fields=False):
    policy_version: int
    checksum: str
    path: str
    lease: int
    canary: Canary | None


def snapshot_body(files: Announcement) -> dict[str, Any]:
    """The answer that names a version's files."""
    identity = files.identity
    return to_body(_Snapshot(identity.number, identity.digest, files.path, files.lease, files.canary))


def read_snapshot(data: bytes) -> Announcement:
    """The inverse, from an answer; MalformedMessageError otherwise."""
    found = from_body(data, _Snapshot)
    return Announcement(PolicyIdentity(found.policy_version, found.checksum), found.path, found.lease, found.canary)


class Turn(Contract, frozen=True):
    """A turn of the trainer on GPUs that it shares with the engines: its lease's number, and the turn's under it."""

    lease: Number
    number: Number

    def __str__(self) -> str:
        return f"{self.lease}.{self.number}"


def read_turn(body: dict[str, Any]) -> Turn:
    """The body of a request to sleep; WeightsError if it is not one."""
    turn: Turn = read_body(body, Turn, "request to sleep")
    return turn


class Doubt(Contract, frozen=True):
    """Others received wrong bytes from this server: it has to load its weights anew. lease: the trainer's."""

    lease: Number
    why: Annotated[str, msgspec.Meta(max_length=2000)]


def read_doubt(body: dict[str, Any]) -> Doubt:
    """The body of a doubt; WeightsError if it is not one."""
    doubt: Doubt = read_body(body, Doubt, "doubt about weights")
    return doubt


class ServedWeights(Contract, frozen=True, forbid_unknown_fields=False, omit_defaults=True):
    """The version that a rollout server serves, the time that generation was paused for it, and the engine.

    policy_version and checksum are None before any push; engine_starts counts the engine's starts. left: in the answer
    to a push, the parents that did not send the version as they should.
    """

    policy_version: int | None
    checksum: str | None
    paused_seconds: float
    state: ServerState
    engine: str
    engine_starts: int
    engine_device: str
    engine_num_ranks: int
    left: tuple[LeftParent, ...] = ()

    @property
    def identity(self) -> PolicyIdentity | None:
        if self.policy_version is None or self.checksum is None:
            return None
        return PolicyIdentity(self.policy_version, self.checksum)

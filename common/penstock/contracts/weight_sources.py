"""Where the bytes of a pushed version are: the source in the trainer's `PUT /v1/weights/{version}`.

Owns these messages, one per transport; the tag `transport` distinguishes them. Invariant: a source names no code and
holds nothing pickled, and no name in it leads out of its place; buckets hold full tensors one after the other, without
gaps, in the order in which they are sent.
"""

from math import prod
from typing import Annotated, Any, Literal

import msgspec

from penstock.contracts.vocabulary import Dtype
from penstock.contracts.wire import Contract
from penstock.errors import WeightsError

ITEM_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
MAX_NUMBER = 2**53  # what JSON and Lua hold exactly

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
"""A name: one line, without control characters."""
Number = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
"""A count, a size, a version or a lease."""


class TensorSpec(Contract, frozen=True):
    """One tensor of a bucket."""

    name: Text
    dtype: Dtype
    shape: tuple[Number, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class DiskSource(Contract, frozen=True, tag_field="transport", tag="disk"):
    """Files in the folder that the push names, with their manifest."""


class CollectiveSource(Contract, frozen=True, tag_field="transport", tag="nccl"):
    """Broadcasts by rank 0 of a process group that the engine has already joined, one per bucket."""

    group: Text
    buckets: tuple[tuple[TensorSpec, ...], ...]


class SharedBucket(Contract, frozen=True):
    """A piece of shared memory on this host: its name, its size in bytes, and the tensors in it."""

    handle: Annotated[str, msgspec.Meta(pattern=r"^/?[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}\Z")]
    num_bytes: Number
    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        needed = sum(tensor.num_bytes for tensor in self.tensors)
        if needed > self.num_bytes:
            raise ValueError(f"{self.handle} has {self.num_bytes} bytes, and its tensors {needed}: expected no more")


class TensorSource(Contract, frozen=True, tag_field="transport", tag="tensor"):
    """Memory that the trainer shares on this host; `manager`: the socket of the torch process that counts its users."""

    manager: Text
    buckets: tuple[SharedBucket, ...]


class Parent(Contract, frozen=True):
    """A service that sends the chunks of a version to others: a rollout server, or the trainer."""

    name: Text
    url: Annotated[str, msgspec.Meta(max_length=2048, pattern=r"^https?://[^\x00-\x20\x7f]+\Z")]


class RelaySource(Contract, frozen=True, tag_field="transport", tag="relay"):
    """Chunks of the version's files, from the first parent that sends them; the last one is the trainer."""

    parents: Annotated[tuple[Parent, ...], msgspec.Meta(min_length=1, max_length=2**16)]


LeftFor = Literal["gone", "slow", "wrong"]
"""Why a server left a parent: it sent nothing, less than it could, or other bytes than the announced ones."""


class LeftParent(Contract, frozen=True):
    """A parent that a server has left for its next one. detail: what was seen."""

    name: str
    reason: LeftFor
    detail: str


class RelayRequest(Contract, frozen=True):
    """Send the chunks of the version whose list has the digest `chunks`, from number `start` on.

    with_list: send the list first.
    """

    chunks: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    start: Number
    with_list: bool


Source = DiskSource | CollectiveSource | TensorSource | RelaySource


class GroupRequest(Contract, frozen=True):
    """Join a process group of `num_ranks` as rank 1 and up; rank 0 waits at the address. lease: the trainer's."""

    group: Text
    address: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    num_ranks: Annotated[int, msgspec.Meta(ge=2, le=2**16)]
    backend: Literal["nccl", "gloo"]
    lease: Number


def read_group_request(body: dict[str, Any]) -> GroupRequest:
    """The body of a request to join a group; WeightsError if it is not one."""
    request: GroupRequest = read_body(body, GroupRequest, "request to join a group")
    return request


def read_relay_request(body: dict[str, Any]) -> RelayRequest:
    """The body of a request for chunks; WeightsError if it is not one."""
    request: RelayRequest = read_body(body, RelayRequest, "request for chunks")
    return request


def read_body(body: dict[str, Any], kind: Any, what: str) -> Any:
    """The body of a request as a message; WeightsError names the first field that does not fit this release."""
    try:
        return msgspec.convert(body, type=kind)
    except msgspec.ValidationError as error:
        raise WeightsError(
            f"the {what} is {str(body)[:200]} ({error}): expected a message of this release; trainer and rollout "
            "services must be of one release"
        ) from error

"""Where the bytes of a pushed version are: the source in the trainer's `PUT /v1/weights/{version}`.

Owns these messages, one per transport; the tag `transport` distinguishes them. Invariant: a source names no code and
holds nothing pickled; buckets hold full tensors one after the other, without gaps, in the order in which they are sent.
"""

from typing import Any, Literal

import msgspec

from penstock.contracts.groups import Contract
from penstock.contracts.vocabulary import Dtype
from penstock.errors import WeightsError


class TensorSpec(Contract, frozen=True):
    """One tensor of a bucket."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]


class DiskSource(Contract, frozen=True, tag_field="transport", tag="disk"):
    """Files in the folder that the push names, with their manifest."""


class CollectiveSource(Contract, frozen=True, tag_field="transport", tag="nccl"):
    """Broadcasts by rank 0 of a process group that the engine has already joined, one per bucket."""

    group: str
    buckets: tuple[tuple[TensorSpec, ...], ...]


class SharedBucket(Contract, frozen=True):
    """A piece of shared memory on this host: its name, its size in bytes, and the tensors in it."""

    handle: str
    num_bytes: int
    tensors: tuple[TensorSpec, ...]


class TensorSource(Contract, frozen=True, tag_field="transport", tag="tensor"):
    """Memory that the trainer shares on this host; `manager`: the socket of the torch process that counts its users."""

    manager: str
    buckets: tuple[SharedBucket, ...]


Source = DiskSource | CollectiveSource | TensorSource


class GroupRequest(Contract, frozen=True):
    """Join a process group of `num_ranks` as rank 1 and up; rank 0 waits at the address. lease: the trainer's."""

    group: str
    address: str
    port: int
    num_ranks: int
    backend: Literal["nccl", "gloo"]
    lease: int


def read_group_request(body: dict[str, Any]) -> GroupRequest:
    """The body of a request to join a group; WeightsError if it is not one."""
    request: GroupRequest = read_body(body, GroupRequest, "request to join a group")
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

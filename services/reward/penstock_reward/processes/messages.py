"""The messages between pool and worker process, and their framing.

Owns the messages and the frame: 4 bytes of length (big-endian), then MessagePack. Invariant: no message is pickled, and
a frame longer than MAX_FRAME_BYTES is refused before it is read.

    parent                     child
    Start ------------------->           loads the configured functions
          <------------------- Started | Refused
    CallBatch --------------->           loads further functions that the batch names
          <------------------- Accepted
          <------------------- Outcome   one per call, as soon as it is known: the parent's deadline is per call
"""

import struct
from typing import Literal, TypeVar

import msgspec

MAX_FRAME_BYTES = 1 << 28  # far above a group of G texts and its metadata: a longer frame is a defect
LENGTH = struct.Struct(">I")

FailureKind = Literal[
    "exception",
    "transient",
    "timeout",
    "died",
    "not_a_number",
    "too_large",
    "unavailable",
    "unknown_reward",
    "environment",
]
OUTAGE_KINDS: frozenset[FailureKind | None] = frozenset({"transient", "timeout", "died"})
"""Failures that may pass: such a call is repeated, and many in a row open the function's breaker."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages of the pipe."""


class Start(Message, frozen=True, tag="start"):
    """First frame: load these functions; `modules_path` is put on the import path unless empty."""

    functions: tuple[str, ...]
    modules_path: str


class Started(Message, frozen=True, tag="started"):
    """All functions are loaded; the first line of each one's docstring."""

    descriptions: dict[str, str]


class Refused(Message, frozen=True, tag="refused"):
    """A configured function cannot be loaded."""

    function: str
    reason: str


class Call(Message, frozen=True, array_like=True):
    """One call of one function on one completion of the batch."""

    function: str
    completion: int


class CallBatch(Message, frozen=True, tag="batch"):
    """Calls that share a prompt. `metadata` is MessagePack within MessagePack: each call decodes its own copy."""

    prompt: str
    completions: tuple[str, ...]
    answer: str
    metadata: bytes
    calls: tuple[Call, ...]


class Accepted(Message, frozen=True, tag="accepted"):
    """The batch has arrived and its functions are loaded: the first call begins."""


class Outcome(Message, frozen=True, tag="outcome"):
    """The result of a call: a finite value, or the kind and the text of its failure. seconds: its duration."""

    value: float | None
    seconds: float
    kind: FailureKind | None = None
    reason: str = ""


ToChild = Start | CallBatch
FromChild = Started | Refused | Accepted | Outcome

M = TypeVar("M", bound=Message)


def frame(message: Message) -> bytes:
    """A message as one frame; ValueError if it is too long."""
    data = msgspec.msgpack.encode(message)
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"{len(data)} bytes in one message; expected at most {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(data)) + data


def frame_length(header: bytes) -> int:
    """Length of the frame that a header announces; ValueError if it is too large."""
    length: int = LENGTH.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes; expected at most {MAX_FRAME_BYTES}")
    return length

"""The framing of messages between a service and a worker process: 4 bytes of length (big-endian), then MessagePack.

Invariant: no message is pickled, and a frame longer than MAX_FRAME_BYTES is refused before it is read. Each service has
messages of its own.
"""

import struct

import msgspec

MAX_FRAME_BYTES = 1 << 28  # far above what any call carries: a longer frame is a defect
LENGTH = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages of the pipe."""


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

"""The base of every message, and its two wire formats.

Owns the formats: msgspec structs as MessagePack maps between services, as JSON in HTTP bodies; never pickle. Arrays
travel as little-endian bytes: token ids int32, log-probabilities float32, optional masks uint8.
"""

import sys
from array import array
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec


class MalformedMessageError(ValueError):
    """Bytes that are not a message of the expected schema; the text gives the reason."""


def _little_endian(values: "array[Any]") -> "array[Any]":
    if sys.byteorder == "big":
        values.byteswap()
    return values


def pack_int32(values: Iterable[int]) -> bytes:
    """Token ids as little-endian int32; OverflowError outside its range."""
    return _little_endian(array("i", values)).tobytes()


def pack_float32(values: Iterable[float]) -> bytes:
    """Log-probabilities as little-endian float32."""
    return _little_endian(array("f", values)).tobytes()


def unpack_int32(data: bytes) -> list[int]:
    """The inverse of `pack_int32`."""
    return _little_endian(array("i", data)).tolist()


def unpack_float32(data: bytes) -> list[float]:
    """The inverse of `pack_float32`."""
    return _little_endian(array("f", data)).tolist()


class Contract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every part of a message."""


M = TypeVar("M", bound=Contract)

_encoder = msgspec.msgpack.Encoder()


def encode(message: Contract) -> bytes:
    """A message as MessagePack."""
    return _encoder.encode(message)


def decode(data: bytes, expected: type[M]) -> M:
    """Bytes as a message of the expected type; MalformedMessageError with the reason otherwise."""
    try:
        return msgspec.msgpack.decode(data, type=expected)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # the last: nested too deeply
        raise MalformedMessageError(f"not a {expected.__name__}: {error}") from error


def to_body(message: Contract) -> dict[str, Any]:
    """A message as the JSON body of an HTTP request or answer."""
    body: dict[str, Any] = msgspec.to_builtins(message)
    return body


def from_body(data: bytes, expected: type[M]) -> M:
    """A JSON body as a message of the expected type; MalformedMessageError with the reason otherwise."""
    try:
        return msgspec.json.decode(data, type=expected)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedMessageError(f"not a {expected.__name__.lstrip('_')}: {error}") from error

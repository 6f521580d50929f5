"""A dead letter as people read it: its message as JSON with its arrays as numbers, or its first bytes.

Owns how a message is shown, for the command `penstock dead` and for the page of a run. Nothing here fails on a message,
whatever it holds.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from penstock.broker.dead import DeadLetter
from penstock.contracts import MalformedMessageError, Ticket, decode, unpack_float32, unpack_int32
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader, group_of, scored_group, texts_of

HEX_BYTES = 256  # enough to recognise the content
HEX_BYTES_PER_LINE = 16
Parts = Mapping[Part, bytes | None]
ARRAYS: dict[str, Callable[[bytes], list[Any]]] = {
    "prompt_ids": unpack_int32,
    "token_ids": unpack_int32,
    "logprobs": unpack_float32,
    "loss_mask": list,
}


def described(letter: DeadLetter, parts: Parts) -> dict[str, Any]:
    """A letter as JSON-ready values."""
    there = {part: data for part, data in parts.items() if data is not None}
    shown = {
        "id": letter.entry_id,
        "ticket": letter.ticket or None,
        "attempt": letter.attempt,
        "since": when(letter.since),
        "stage": letter.stage,
        "reason": letter.reason,
        "bytes": len(letter.payload) + sum(map(len, there.values())),
    }
    if problem := _problem(letter, parts):
        shown["problem"] = problem
    shown |= _shown(letter.payload)
    return shown | {"parts": {str(part): _shown(data) for part, data in there.items()}} if there else shown


def _shown(data: bytes) -> dict[str, Any]:
    try:
        message = _readable(msgspec.msgpack.decode(data))
        msgspec.json.encode(message)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, TypeError, ValueError):
        return {"hexdump": hexdump(data[:HEX_BYTES])}
    return {"message": message}


def hexdump(data: bytes) -> list[str]:
    """Lines of offset, bytes and printable characters."""
    lines = []
    for start in range(0, len(data), HEX_BYTES_PER_LINE):
        part = data[start : start + HEX_BYTES_PER_LINE]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{start:08x}  {part.hex(' '):{3 * HEX_BYTES_PER_LINE - 1}}  |{shown}|")
    return lines


def _problem(letter: DeadLetter, parts: Parts) -> str:
    """Why the message does not fit its stage; empty if it does."""
    try:
        match letter.stage:
            case "tickets" | "eval":
                decode(letter.payload, Ticket)
            case "rollouts":
                header = decode(letter.payload, RolloutHeader)
                texts_of(header, parts[Part.TEXTS])
                group_of(header, parts)
            case "scored":
                scored_group(decode(letter.payload, ScoredHeader), parts)
            case _:
                return f"no stage {letter.stage!r}"
    except MalformedMessageError as error:
        return str(error)
    return ""


def _readable(value: Any) -> Any:
    """Arrays as numbers, other bytes in hexadecimal."""
    if isinstance(value, dict):
        return {name: _array(name, each) for name, each in value.items()}
    if isinstance(value, list):
        return [_readable(each) for each in value]
    return value.hex() if isinstance(value, bytes) else value


def _array(name: object, value: Any) -> Any:
    unpack = ARRAYS.get(name) if isinstance(name, str) and isinstance(value, bytes) else None
    if isinstance(value, list) and name in ARRAYS:
        return [_array(name, each) for each in value]
    fits = unpack is not None and (unpack is list or len(value) % 4 == 0)
    return unpack(value) if unpack is not None and fits else _readable(value)


def when(seconds: float) -> str:
    """Unix seconds as a time of the world."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

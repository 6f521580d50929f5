"""`penstock dead`: lists the messages that no service could use, shows one, sends some again.

Owns how a message is shown: as JSON with its arrays as numbers, or its first bytes if it does not decode.
`penstock.broker.dead` decides which letters may be sent again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from penstock.broker import Queue
from penstock.broker.dead import DeadLetter, DeadLetters
from penstock.config import Config
from penstock.contracts import MalformedMessageError, Ticket, decode, unpack_float32, unpack_int32
from penstock.contracts.stored_groups import Part, RolloutHeader, ScoredHeader, group_of, scored_group, texts_of
from penstock.errors import ConfigError
from penstock_launch.commands.ask import ask
from penstock_launch.commands.columns import columns

HEX_BYTES = 256  # enough to recognise the content
HEX_BYTES_PER_LINE = 16
REASON_WIDTH = 100
COLUMNS = ("ID", "TICKET", "ATTEMPT", "SINCE", "STAGE", "REASON")
Parts = Mapping[Part, bytes | None]
ARRAYS: dict[str, Callable[[bytes], list[Any]]] = {
    "prompt_ids": unpack_int32,
    "token_ids": unpack_int32,
    "logprobs": unpack_float32,
    "loss_mask": list,
}


def list_dead(config: Config) -> list[str]:
    """The lines of `penstock dead list`."""

    async def read(queue: Queue) -> list[DeadLetter]:
        return [letter async for letter in DeadLetters(queue).letters()]

    letters = ask(config, read)
    if not letters:
        return [f"run {config.run.name} has no dead letters"]
    return list(columns([COLUMNS, *map(_row, letters)]))


def show_dead(config: Config, entry_id: str) -> str:
    """One letter as a JSON document: with `message`, or with `hexdump` if it does not decode; its parts likewise."""

    async def read(queue: Queue) -> tuple[DeadLetter, Parts]:
        dead = DeadLetters(queue)
        letter = await dead.letter(entry_id)
        return letter, await dead.parts(letter)

    return msgspec.json.format(msgspec.json.encode(described(*ask(config, read))), indent=2).decode()


def retry_dead(config: Config, entry_ids: Sequence[str], *, send_all: bool) -> tuple[list[str], bool]:
    """Send letters again; returns a line for each, and whether all named ones were sent."""
    if bool(entry_ids) == send_all:
        raise ConfigError("dead retry: expected ids of dead letters, or --all, and not both")

    async def send(queue: Queue) -> tuple[list[str], bool]:
        dead = DeadLetters(queue)
        # Read first: a letter that dies again while the others are sent is not sent twice.
        chosen = [letter.entry_id async for letter in dead.letters()] if send_all else list(dict.fromkeys(entry_ids))
        results = [await dead.retry(entry_id) for entry_id in chosen]
        num_sent = sum(result.is_sent for result in results)
        lines = [f"{result.entry_id}: {result.text}" for result in results]
        lines.append(f"{num_sent} sent again, {len(results) - num_sent} not")
        return lines, send_all or num_sent == len(results)

    return ask(config, send)


def described(letter: DeadLetter, parts: Parts) -> dict[str, Any]:
    """A letter as JSON-ready values."""
    there = {part: data for part, data in parts.items() if data is not None}
    shown = {
        "id": letter.entry_id,
        "ticket": letter.ticket or None,
        "attempt": letter.attempt,
        "since": _when(letter.since),
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
    fits = unpack is not None and (unpack is list or len(value) % 4 == 0)
    return unpack(value) if unpack is not None and fits else _readable(value)


def _row(letter: DeadLetter) -> tuple[str, ...]:
    reason = " ".join(letter.reason.split())
    shown = reason if len(reason) <= REASON_WIDTH else f"{reason[:REASON_WIDTH]}..."
    return letter.entry_id, letter.ticket or "-", letter.attempt or "-", _when(letter.since), letter.stage or "-", shown


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))

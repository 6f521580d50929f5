"""Dead letters as lines of `dead.jsonl`, so that whoever looks at the run's folder sees what could not be used.

Owns which letters have a line: each of the queue, once, those of a time without a trainer included. Invariant: a line
is bounded, whatever the message holds; a message that is larger than `MOST_BYTES` is not decoded.
"""

import asyncio
from typing import Any

import msgspec

from penstock.broker.dead import DeadLetter, DeadLetters
from penstock.broker.dead_text import HEX_BYTES, Parts, described, hexdump
from penstock.readable import cut
from penstock.records.dead_letters import DeadLetterLine
from penstock.records.lines import decoded
from penstock_trainer.telemetry.last_lines import LastLines

MOST_BYTES = 2**20  # of a message that is shown as JSON
TEXT_CHARACTERS = 8000
REASON_CHARACTERS = 2000


class BuriedMessages:
    """The dead letters of a run that are to be noted."""

    def __init__(self, letters: DeadLetters, file: LastLines) -> None:
        self._letters = letters
        self._file = file
        self._last = _id_of(file.last())

    async def note(self) -> None:
        """Write a line for each letter that has none."""
        async for letter in self._letters.letters(after=self._last):
            parts = await self._letters.parts(letter)
            await asyncio.to_thread(self._write, letter, parts)
            self._last = letter.entry_id

    def _write(self, letter: DeadLetter, parts: Parts) -> None:
        self._file.add([_line(letter, parts)])


def _id_of(line: bytes) -> str:
    try:
        return decoded(line, DeadLetterLine).id if line else ""
    except msgspec.MsgspecError:  # of another release: its letters get a line again
        return ""


def _line(letter: DeadLetter, parts: Parts) -> DeadLetterLine:
    num_bytes = len(letter.payload) + sum(len(data) for data in parts.values() if data is not None)
    shown: dict[str, Any] = {"hexdump": hexdump(letter.payload[:HEX_BYTES])}
    if num_bytes <= MOST_BYTES:
        shown = described(letter, parts)
    message: dict[str, Any] = {name: shown[name] for name in ("message", "hexdump", "parts") if name in shown}
    return DeadLetterLine(
        id=letter.entry_id,
        ticket=cut(letter.ticket),
        attempt=cut(letter.attempt),
        stage=cut(letter.stage),
        since=letter.since,
        reason=cut(letter.reason, REASON_CHARACTERS),
        num_bytes=num_bytes,
        problem=cut(shown.get("problem", ""), REASON_CHARACTERS),
        text=cut(_text(message), TEXT_CHARACTERS),
    )


def _text(message: dict[str, Any]) -> str:
    """JSON, but the lines of bytes as they are."""
    if list(message) == ["hexdump"]:
        return "\n".join(message["hexdump"])
    return msgspec.json.format(msgspec.json.encode(message), indent=2).decode()

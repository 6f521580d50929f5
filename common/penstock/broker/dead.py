"""Dead letters: messages that nobody could use, and how one is sent again once its cause is repaired.

Owns reading `dead`, and the call of the only script that takes a message out of it. Invariant: a ticket never ends
twice. The script decides by `live`, in one atomic change, for any holder of the lease:

    the letter's ticket                                            result of sending it again
    none, or a name that no ticket has                             back to its stage
    outstanding, and the trainer has not yet read that it died     back to its stage; the note to the trainer is deleted
    outstanding, and in no stream                                  back to its stage
    outstanding, and the trainer holds the note                    refused: it is about to be dropped
    outstanding, and elsewhere (it was issued again)               refused: it is being worked on
    trained or dropped (the usual end of a dead letter: poison)    refused: it has ended
    of an evaluation                                               refused: the evaluation has gone on without it

A refused letter stays in `dead`. If the trainer drops the ticket at the same moment, the ticket still ends once: the
result of the letter is then a duplicate and is deleted. A letter that is sent again starts with no failures and no
deaths.
"""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from penstock.broker.keys import GROUP, Stage, part_name
from penstock.broker.queue import Queue
from penstock.broker.scripts import Script
from penstock.contracts.stored_groups import Part
from penstock.errors import ConfigError

RETRY = Script("anyone/retry")
READ_COUNT = 100  # a letter with a foreign message may be large
ENTRY_ID = re.compile(r"\d+-\d+")

SENT = "sent"
REFUSALS = {
    "gone": "it is no longer there: it was sent again or removed",
    "stage": "it came from {detail!r}, which is no stage of work",
    "evaluation": "its ticket is of an evaluation, which has gone on without it",
    "ended": "its ticket has ended and is not outstanding; a ticket never ends twice",
    "committed": "its ticket is trained",
    "elsewhere": "its ticket was issued again and is in {detail}",
    "held": "the trainer has read that it died and is about to drop its ticket",
}


@dataclass(frozen=True)
class DeadLetter:
    """One entry of `dead`. since: Unix seconds; attempt: how often its ticket was reissued; parts: their name."""

    entry_id: str
    ticket: str
    attempt: str
    stage: str
    reason: str
    payload: bytes
    parts: str

    @property
    def since(self) -> float:
        return int(self.entry_id.partition("-")[0]) / 1000


@dataclass(frozen=True)
class Retry:
    """The outcome of sending a letter again: the stage that it is in now, or why it was refused."""

    entry_id: str
    is_sent: bool
    text: str


class DeadLetters:
    """The dead letters of one run."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    async def letters(self, after: str = "") -> AsyncIterator[DeadLetter]:
        """Those after the entry `after`, or all of them; the oldest first."""
        start = f"({_checked(after)}" if after else "-"
        while entries := await self._read(start, "+"):
            for letter in entries:
                yield letter
            start = f"({entries[-1].entry_id}"

    async def letter(self, entry_id: str) -> DeadLetter:
        """One of them; ConfigError if none has that id."""
        found = await self._read(_checked(entry_id), entry_id)
        if not found:
            raise ConfigError(f"no dead letter {entry_id}: expected an id that `penstock dead list` shows")
        return found[0]

    async def parts(self, letter: DeadLetter) -> dict[Part, bytes | None]:
        """The large fields of a letter's group; None for a missing part."""
        if not letter.parts:
            return dict.fromkeys(Part)
        return dict(zip(Part, await self._queue.read(self._queue.keys.parts(letter.parts)), strict=True))

    async def retry(self, entry_id: str) -> Retry:
        """Send a letter to the stage that it came from, if its ticket allows it."""
        keys = self._queue.keys
        answer = await self._queue.run(
            RETRY(
                dead=keys.dead,
                live=keys.live,
                failures=keys.failures,
                deaths=keys.deaths,
                lease=keys.lease,
                stages=[{"stream": keys.stream(stage), "waiting": keys.waiting(stage)} for stage in Stage],
                group=GROUP,
                letter=_checked(entry_id),
                stage_names=list(Stage),
            )
        )
        outcome, detail = (part.decode(errors="replace") for part in answer)
        if outcome == SENT:
            return Retry(entry_id, True, f"sent again to {detail}")
        return Retry(entry_id, False, f"not sent: {REFUSALS[outcome].format(detail=detail)}")

    async def _read(self, start: str, end: str) -> list[DeadLetter]:
        entries = await self._queue.guard(
            self._queue.client.xrange(self._queue.keys.dead, min=start, max=end, count=READ_COUNT)
        )
        return [_letter(entry_id.decode(), fields) for entry_id, fields in entries]


def _letter(entry_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    ticket, attempt, stage, reason = (
        fields.get(name, b"").decode(errors="replace") for name in (b"t", b"a", b"s", b"x")
    )
    return DeadLetter(entry_id, ticket, attempt, stage, reason, fields.get(b"p", b""), part_name(fields.get(b"n", b"")))


def _checked(entry_id: str) -> str:
    if not ENTRY_ID.fullmatch(entry_id):
        raise ConfigError(
            f"{entry_id!r} is no id of a dead letter: expected one like 1700000000000-0, as `penstock dead list` shows"
        )
    return entry_id

"""`penstock dead`: lists the messages that no service could use, shows one, sends some again.

Owns the lines and documents of the command. `penstock.broker.dead_text` decides how a message is shown, and
`penstock.broker.dead` which letters may be sent again.
"""

from collections.abc import Sequence

import msgspec

from penstock.broker import Queue
from penstock.broker.dead import DeadLetter, DeadLetters
from penstock.broker.dead_text import Parts, described, when
from penstock.config import Config
from penstock.errors import ConfigError
from penstock_launch.commands.ask import ask
from penstock_launch.commands.columns import columns

REASON_WIDTH = 100
COLUMNS = ("ID", "TICKET", "ATTEMPT", "SINCE", "STAGE", "REASON")


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


def _row(letter: DeadLetter) -> tuple[str, ...]:
    reason = " ".join(letter.reason.split())
    shown = reason if len(reason) <= REASON_WIDTH else f"{reason[:REASON_WIDTH]}..."
    return letter.entry_id, letter.ticket or "-", letter.attempt or "-", when(letter.since), letter.stage or "-", shown

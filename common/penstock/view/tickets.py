"""The ledger of a run as an index: which step trained a ticket, or why it ended otherwise.

Owns the reading of `steps/ledger.jsonl`, line by line as it grows. Invariant: 12 bytes for each ticket that has ended;
the words of a dropped ticket are read from the file when asked for.
"""

from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from penstock.contracts.ledger import (
    CheckpointRecord,
    DropRecord,
    RunRecord,
    StepRecord,
    WeightsRecord,
    decode_record,
)
from penstock.contracts.vocabulary import DropReason
from penstock.errors import DataError
from penstock.records.files import LEDGER_FILE, STEP_FILES
from penstock.seeds import permutation
from penstock.view.lines import LineIndex

REASONS = tuple(DropReason)
MOST_PROMPTS = 50_000  # of a data set whose draws are looked for: an epoch's order takes a microsecond each
MOST_ORDERS = 32  # epochs whose order is held


@dataclass(frozen=True)
class Committed:
    """A committed step without its tickets. policy: of the weights that it trained; changed: None: not recorded yet."""

    step: int
    file: str
    digest: str
    version: int | None
    max_lag: int | None
    settings: str


class Ledger:
    """The ends of tickets, the step files and the weights that count."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / STEP_FILES / LEDGER_FILE
        self._lines = LineIndex(self._path)
        self._clear()

    def _clear(self) -> None:
        self.run: RunRecord | None = None
        self.steps: dict[int, Committed] = {}
        self.policies: dict[int, str] = {}
        """Version -> digest of its bytes, in full."""
        self.unchanged: set[int] = set()
        """Steps after which the weights stayed as they were."""
        self.checkpoints: list[CheckpointRecord] = []
        self._trained = array("q")
        self._trained_in = array("i")
        self._dropped = array("q")
        self._reasons = array("b")
        self._drop_lines = array("i")
        self._orders: dict[int, array[int]] = {}

    def refresh(self) -> None:
        """Read what was appended. DataError if a line is broken."""
        replaced, lines = self._lines.new_lines()
        if replaced or not len(self._lines):
            self._clear()
        for number, line in enumerate(lines, start=len(self._lines)):
            try:
                self._add(number, decode_record(line))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                self._lines.forget()
                raise DataError(f"{self._path}, line {number + 1} ({error}): expected records of the ledger") from None

    def _add(self, number: int, record: Any) -> None:
        match record:
            case RunRecord():
                self.run = self.run or record
            case StepRecord():
                self.steps[record.step] = Committed(
                    record.step, record.file, record.digest, record.version, record.max_lag, record.settings
                )
                self._trained.extend(record.tickets)
                self._trained_in.extend([record.step] * len(record.tickets))
            case WeightsRecord():
                self.policies[record.policy.number] = record.policy.digest
                if not record.changed:
                    self.unchanged.add(record.steps - 1)
            case DropRecord():
                self._dropped.append(record.ticket)
                self._reasons.append(REASONS.index(record.reason))
                self._drop_lines.append(number)
            case CheckpointRecord():
                self.checkpoints.append(record)

    @property
    def num_trained(self) -> int:
        return len(self._trained)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped tickets by reason."""
        return {str(REASONS[code]): count for code, count in sorted(Counter(self._reasons).items())}

    def end_of(self, ticket: int) -> dict[str, Any]:
        """How a ticket ended: `end` is trained, dropped, or outstanding: not ended, or never issued."""
        if ticket in self._dropped:
            return {"end": "dropped", **self._drop(self._dropped.index(ticket))}
        if ticket in self._trained:
            return {"end": "trained", "ticket": ticket, "step": self._trained_in[self._trained.index(ticket)]}
        return {"end": "outstanding", "ticket": ticket}

    def drops(self, reason: str, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """How many tickets were dropped for a reason ("": any), and some of them, the last one first."""
        wanted = [place for place, code in enumerate(self._reasons) if reason in ("", REASONS[code])]
        newest_first = wanted[::-1][offset : offset + limit]
        return len(wanted), [self._drop(place) for place in newest_first]

    def _drop(self, place: int) -> dict[str, Any]:
        try:
            record = decode_record(self._lines.read(self._drop_lines[place]))
        except msgspec.MsgspecError:  # the file was replaced meanwhile
            record = None
        known = record if isinstance(record, DropRecord) else DropRecord(-1, REASONS[self._reasons[place]])
        return {
            "ticket": self._dropped[place],
            "reason": str(REASONS[self._reasons[place]]),
            "why": known.why,
            "num_completions": known.num_completions,
            "failures": known.failures,
        }

    def draws_of_same_prompt(self, ticket: int, most: int) -> list[int]:
        """The tickets that draw the same prompt, up to the last one that has ended; at most `most`, the newest first.

        Epoch e visits the prompts in the order of `permutation(seed, e)`: a ticket's number says which prompt it draws.
        Of a ticket that was never issued, and of a large data set, the ticket alone.
        """
        length = self.run.dataset_length if self.run else 0
        last = max([*self._trained[-length:], *self._dropped[-length:]], default=-1)
        if not 0 < length <= MOST_PROMPTS or ticket > last + length:
            return [ticket]
        last = max(ticket, last)
        prompt = self._order(ticket // length)[ticket % length]
        found: list[int] = []
        for epoch in range(last // length, -1, -1):
            drawn = epoch * length + self._order(epoch).index(prompt)
            if drawn <= last:
                found.append(drawn)
            if len(found) == most:
                break
        return found

    def _order(self, epoch: int) -> "array[int]":
        if epoch not in self._orders:
            assert self.run is not None
            if len(self._orders) >= MOST_ORDERS:
                self._orders.clear()
            self._orders[epoch] = array("i", permutation(self.run.seed, epoch, self.run.dataset_length))
        return self._orders[epoch]

"""The ledger of a run as an index: which step trained a ticket, or why it ended otherwise.

Owns the reading of `steps/ledger.jsonl` and of the archive of its oldest records, line by line as they grow. Invariant:
12 bytes for each ticket that has ended; the words of a dropped ticket are read from the file when asked for. A journal
that is written anew, since its oldest records have moved, leaves the archive's index as it is.
"""

from array import array
from collections import ChainMap, Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from penstock.contracts.ledger import (
    ArchivedRecord,
    CheckpointRecord,
    DropRecord,
    EarlyStopRecord,
    RunRecord,
    StepRecord,
    WeightsRecord,
    decode_record,
)
from penstock.contracts.vocabulary import DropReason
from penstock.errors import DataError
from penstock.records.files import ARCHIVE_FILE, LEDGER_FILE, STEP_FILES
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


class _Part:
    """The records in one file of the ledger: of the archive, or of the journal."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines = LineIndex(path)
        self._clear()

    def _clear(self) -> None:
        self.run: RunRecord | None = None
        self.archived_bytes = 0
        self.steps: dict[int, Committed] = {}
        self.policies: dict[int, str] = {}
        self.unchanged: set[int] = set()
        self.checkpoints: list[CheckpointRecord] = []
        self.early_stop: EarlyStopRecord | None = None
        self.trained = array("q")
        self.trained_in = array("i")
        self.dropped = array("q")
        self.reasons = array("b")
        self._drop_lines = array("i")

    def refresh(self, size: int | None = None) -> None:
        """Read what was appended, up to byte `size`. DataError if a line is broken."""
        replaced, lines = self._lines.new_lines(size)
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
            case ArchivedRecord():
                self.run, self.archived_bytes = record.run, record.num_bytes
            case RunRecord():
                self.run = self.run or record
            case StepRecord():
                self.steps[record.step] = Committed(
                    record.step, record.file, record.digest, record.version, record.max_lag, record.settings
                )
                self.trained.extend(record.tickets)
                self.trained_in.extend([record.step] * len(record.tickets))
            case WeightsRecord():
                self.policies[record.policy.number] = record.policy.digest
                if not record.changed:
                    self.unchanged.add(record.steps - 1)
            case DropRecord():
                self.dropped.append(record.ticket)
                self.reasons.append(REASONS.index(record.reason))
                self._drop_lines.append(number)
            case CheckpointRecord():
                self.checkpoints.append(record)
            case EarlyStopRecord():
                self.early_stop = record

    def end_of(self, ticket: int) -> dict[str, Any] | None:
        """How a ticket ended; None if no record here says so."""
        if ticket in self.dropped:
            return {"end": "dropped", **self.drop(self.dropped.index(ticket))}
        if ticket in self.trained:
            return {"end": "trained", "ticket": ticket, "step": self.trained_in[self.trained.index(ticket)]}
        return None

    def drop(self, place: int) -> dict[str, Any]:
        """The dropped ticket at this place, with the words of its record."""
        try:
            record = decode_record(self._lines.read(self._drop_lines[place]))
        except msgspec.MsgspecError:  # the file was replaced meanwhile
            record = None
        known = record if isinstance(record, DropRecord) else DropRecord(-1, REASONS[self.reasons[place]])
        return {
            "ticket": self.dropped[place],
            "reason": str(REASONS[self.reasons[place]]),
            "why": known.why,
            "num_completions": known.num_completions,
            "failures": known.failures,
        }


class Ledger:
    """The ends of tickets, the step files and the weights that count."""

    def __init__(self, folder: Path) -> None:
        self._archive = _Part(folder / STEP_FILES / ARCHIVE_FILE)
        self._journal = _Part(folder / STEP_FILES / LEDGER_FILE)
        self._parts = (self._archive, self._journal)
        self._orders: dict[tuple[int, int, int], array[int]] = {}

    def refresh(self) -> None:
        """Read what was appended. DataError if a line is broken."""
        self._journal.refresh()
        self._archive.refresh(self._journal.archived_bytes)

    @property
    def run(self) -> RunRecord | None:
        return self._journal.run

    @property
    def steps(self) -> Mapping[int, Committed]:
        return ChainMap(self._journal.steps, self._archive.steps)

    @property
    def policies(self) -> Mapping[int, str]:
        """Version -> digest of its bytes, in full."""
        return ChainMap(self._journal.policies, self._archive.policies)

    @property
    def unchanged(self) -> set[int]:
        """Steps after which the weights stayed as they were."""
        return self._archive.unchanged | self._journal.unchanged

    @property
    def checkpoints(self) -> list[CheckpointRecord]:
        return [*self._archive.checkpoints, *self._journal.checkpoints]

    @property
    def early_stop(self) -> EarlyStopRecord | None:
        """The last decision to end the run before all of its steps."""
        return self._journal.early_stop or self._archive.early_stop

    @property
    def num_trained(self) -> int:
        return sum(len(part.trained) for part in self._parts)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped tickets by reason."""
        counts = Counter(code for part in self._parts for code in part.reasons)
        return {str(REASONS[code]): count for code, count in sorted(counts.items())}

    def end_of(self, ticket: int) -> dict[str, Any]:
        """How a ticket ended: `end` is trained, dropped, or outstanding: not ended, or never issued."""
        found = (end for part in self._parts if (end := part.end_of(ticket)) is not None)
        return next(found, {"end": "outstanding", "ticket": ticket})

    def drops(self, reason: str, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
        """How many tickets were dropped for a reason ("": any), and some of them, the last one first."""
        wanted = [
            (part, place)
            for part in self._parts
            for place, code in enumerate(part.reasons)
            if reason in ("", REASONS[code])
        ]
        newest_first = wanted[::-1][offset : offset + limit]
        return len(wanted), [part.drop(place) for part, place in newest_first]

    def draws_of_same_prompt(self, ticket: int, most: int) -> list[int]:
        """The tickets that draw the same prompt, up to the last one that has ended; at most `most`, the newest first.

        Epoch e visits the prompts in the order of `permutation(seed, e)`: a ticket's number says which prompt it draws.
        Of a ticket that was never issued, of a large data set, and of a run that draws otherwise, the ticket alone.
        """
        if self.run is not None and self.run.draws:
            return [ticket]
        length = self.run.dataset_length if self.run else 0
        ended = (each for part in self._parts for each in (*part.trained[-length:], *part.dropped[-length:]))
        last = max(ended, default=-1)
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
        assert self.run is not None
        key = (self.run.seed, epoch, self.run.dataset_length)
        if key not in self._orders:
            if len(self._orders) >= MOST_ORDERS:
                self._orders.clear()
            self._orders[key] = array("i", permutation(*key))
        return self._orders[key]

"""The ledger: the events of tickets and weights, in the order that a restart replays.

Owns the records and their replay into a `LedgerState`. A record is the commit point of the file that it names: a step
file or checkpoint that the ledger does not name is ignored. Pure data; `penstock.broker.trainer` stores it, the trainer
reads it at start, `penstock_launch` reads it for status.

A long ledger does not hold all its records: the oldest are in the archive, a file of the run, and the ledger begins
with an `ArchivedRecord` in their place, which says what they come to.
"""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from penstock.contracts.trajectories import PolicyIdentity
from penstock.contracts.vocabulary import DropReason
from penstock.contracts.wire import Contract


class Outcome(NamedTuple):
    """What a ticket came to, for the curriculum: its prompt, counted from 0 over all sets, and of its completions with
    a reward, how many succeeded and how many there are."""

    prompt: int
    successes: int
    completions: int


class RunRecord(Contract, frozen=True, tag_field="record", tag="run"):
    """First record: what must not change between starts: the meaning of every ticket number, and the trained model.

    model: fingerprint of the weights that training began with; model_path: where they were, for messages. lora: the
    adapter in words; empty: all weights are trained. An older ledger has "" as model, and says nothing of either.
    draws: how prompts are drawn, in words; "": each epoch visits them once, in the order of `permutation(seed, epoch)`.
    set_sizes: prompts of each training set, in order; empty if there is one.
    """

    dataset_digest: str
    dataset_length: int
    batch_size: int
    group_size: int
    seed: int
    model: str = ""
    model_path: str = ""
    lora: str = ""
    draws: str = ""
    set_sizes: dict[str, int] = msgspec.field(default_factory=dict)


class StepRecord(Contract, frozen=True, tag_field="record", tag="step"):
    """Batch `step` (from 0) is closed: its groups are in `file`, and no other step trains its tickets.

    version: of the weights that it trains. max_lag: tokens with a larger staleness are masked; None: no token is.
    settings: digest of the configuration that it was trained with, whose text lies beside the step files. All three
    reproduce the step even after a change of the configuration; an older ledger has version None and settings "".
    outcomes: of its tickets, in a run with a curriculum, whose later draws follow from them.
    """

    step: int
    tickets: tuple[int, ...]
    file: str
    digest: str
    version: int | None = None
    max_lag: int | None = None
    settings: str = ""
    outcomes: tuple[Outcome, ...] = ()

    @property
    def number(self) -> int:
        """As people count, from 1."""
        return self.step + 1


class WeightsRecord(Contract, frozen=True, tag_field="record", tag="weights"):
    """Weights after `steps` steps are `policy`; `changed` is False after a step with a non-finite gradient.

    num_ranks, device: of the trainer that computed them. Another number of ranks adds in another order and gives other
    bits; a device other than the CPU may give different bits each time. form: type and rounding of the bytes that the
    policy's digest is of, as `bfloat16 dithered`; an older ledger has "". settings: digest of those with which the last
    step was trained, if a later start of the trainer did that; else "", and they are those of the step's record.
    """

    policy: PolicyIdentity
    steps: int
    changed: bool = True
    num_ranks: int = 1
    device: str = "cpu"
    form: str = ""
    settings: str = ""


class DropRecord(Contract, frozen=True, tag_field="record", tag="drop", omit_defaults=True):
    """A ticket ended without being trained.

    why: the words of the service that could not use its message. num_completions: of its group; 0: there was none.
    failures: why some of them have no reward, each with their number. An older ledger has none of these.
    dataset: the ticket's set of training prompts; "" if the run has one. outcome: as of a step's tickets.
    """

    ticket: int
    reason: DropReason
    why: str = ""
    num_completions: int = 0
    failures: dict[str, int] = msgspec.field(default_factory=dict)
    dataset: str = ""
    outcome: Outcome | None = None


class CheckpointRecord(Contract, frozen=True, tag_field="record", tag="checkpoint"):
    """A checkpoint after `steps` steps is complete under `name`."""

    steps: int
    name: str


class EarlyStopRecord(Contract, frozen=True, tag_field="record", tag="early_stop"):
    """The run ends after `steps` steps, before all of them. A run that goes on has further steps after it.

    By eval.patience: in `patience` evaluations of a set none exceeded `best` by more than min_delta. metric: the figure
    that was compared. best_steps: those before the evaluation that gave `best`.
    solved_tickets: if not 0, the run has solved its task: in that many tickets in a row, the last ones, no group had a
    gradient, and no completion had a reward below `best`, which reaches `success` (eval.success).
    """

    steps: int
    set: str = ""
    metric: str = ""
    best: float = 0.0
    best_steps: int = 0
    patience: int = 0
    min_delta: float = 0.0
    solved_tickets: int = 0
    success: float = 0.0


class ArchivedRecord(Contract, frozen=True, tag_field="record", tag="archived"):
    """First record of a ledger whose oldest records, those before step `num_steps`, are in the archive.

    num_bytes: length of the archive that holds them; what follows there does not count. ended: tickets that they end,
    as ranges [start, end). num_trained, num_dropped: how many, by reason. checkpoints: those of their checkpoints that
    existed.
    """

    run: RunRecord
    num_steps: int
    num_bytes: int
    ended: tuple[tuple[int, int], ...]
    num_trained: int
    num_dropped: dict[DropReason, int]
    checkpoints: tuple[CheckpointRecord, ...]


Record = ArchivedRecord | RunRecord | StepRecord | WeightsRecord | DropRecord | CheckpointRecord | EarlyStopRecord


def encode_record(record: Record) -> bytes:
    """A record as JSON, so that a person can read the ledger."""
    return msgspec.json.encode(record)


def decode_record(data: bytes) -> Record:
    """The inverse; msgspec.DecodeError if the bytes are not a record."""
    record: Record = msgspec.json.decode(data, type=Record)
    return record


@dataclass
class LedgerState:
    """The state that results from a ledger."""

    run: RunRecord | None = None
    archived: ArchivedRecord | None = None
    """Stands for the records of earlier steps, which are not among those below."""
    steps: list[StepRecord] = field(default_factory=list)
    policies: dict[int, PolicyIdentity] = field(default_factory=dict)
    num_ranks: dict[int, int] = field(default_factory=dict)
    """Version -> ranks that computed it."""
    forms: dict[int, str] = field(default_factory=dict)
    """Version -> form of the bytes that its digest is of."""
    weights: dict[int, WeightsRecord] = field(default_factory=dict)
    """Steps -> the weights after them, by the last record."""
    drops: dict[int, DropRecord] = field(default_factory=dict)
    """Ticket -> its end without a step."""
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    early_stop: EarlyStopRecord | None = None
    """The last one."""

    @property
    def unfinished(self) -> StepRecord | None:
        """The last step, if the trainer ended before it recorded the weights after it. Nothing depends on them yet."""
        last = self.steps[-1] if self.steps else None
        return last if last is not None and last.step + 1 not in self.weights else None

    @property
    def has_finished_steps(self) -> bool:
        """Whether there are weights that a step has made, which a run can go on from."""
        return self.archived is not None or any(self.weights)

    @property
    def num_steps(self) -> int:
        """All of them, archived ones included."""
        return max((each.step + 1 for each in self.steps), default=self.archived.num_steps if self.archived else 0)

    @property
    def dropped(self) -> dict[int, DropReason]:
        """Ticket -> why it was not trained."""
        return {ticket: record.reason for ticket, record in self.drops.items()}

    @property
    def trained(self) -> dict[int, int]:
        """Ticket -> the step that trained it."""
        return {ticket: record.step for record in self.steps for ticket in record.tickets}

    @property
    def num_trained(self) -> int:
        """Tickets, archived ones included."""
        archived = self.archived.num_trained if self.archived else 0
        return archived + sum(len(record.tickets) for record in self.steps)

    @property
    def num_dropped(self) -> dict[DropReason, int]:
        """Tickets by reason, archived ones included."""
        archived = self.archived.num_dropped if self.archived else {}
        return dict(Counter(archived) + Counter(record.reason for record in self.drops.values()))

    @property
    def ended(self) -> tuple[tuple[int, int], ...]:
        """All tickets that were trained or dropped, as ranges [start, end) in order, with a gap between two."""
        archived = self.archived.ended if self.archived else ()
        found: list[list[int]] = []
        for start, end in sorted([*archived, *((n, n + 1) for n in (*self.trained, *self.drops))]):
            if found and start <= found[-1][1]:
                found[-1][1] = max(end, found[-1][1])
            else:
                found.append([start, end])
        return tuple((start, end) for start, end in found)

    def not_ended(self, next_number: int) -> list[int]:
        """The tickets below `next_number` that were neither trained nor dropped."""
        edges = [0, *(edge for each in self.ended for edge in each), next_number]
        return [n for start, end in zip(edges[::2], edges[1::2], strict=True) for n in range(start, end)]


def replay(records: Iterable[Record]) -> LedgerState:
    """Fold records into a state."""
    state = LedgerState()
    for record in records:
        match record:
            case ArchivedRecord():
                state.run, state.archived = record.run, record
                state.checkpoints.extend(record.checkpoints)
            case RunRecord():
                state.run = state.run or record
            case StepRecord():
                state.steps.append(record)
            case WeightsRecord():
                state.policies[record.policy.number] = record.policy
                state.num_ranks[record.policy.number] = record.num_ranks
                state.forms[record.policy.number] = record.form
                state.weights[record.steps] = record
                if record.settings and state.steps and state.steps[-1].step + 1 == record.steps:
                    state.steps[-1] = msgspec.structs.replace(state.steps[-1], settings=record.settings)
            case DropRecord():
                state.drops[record.ticket] = record
            case CheckpointRecord():
                state.checkpoints.append(record)
            case EarlyStopRecord():
                state.early_stop = record
    return state


def archived(records: Sequence[Record], num_bytes: int, *, exists: Container[CheckpointRecord]) -> ArchivedRecord:
    """What the oldest records of a ledger come to, once an archive of `num_bytes` holds them.

    exists: the checkpoints that are still there.
    """
    state = replay(records)
    if state.run is None:
        raise ValueError("the records to archive have no run: expected them to begin a ledger")
    return ArchivedRecord(
        run=state.run,
        num_steps=state.num_steps,
        num_bytes=num_bytes,
        ended=state.ended,
        num_trained=state.num_trained,
        num_dropped=state.num_dropped,
        checkpoints=tuple(each for each in state.checkpoints if each in exists),
    )

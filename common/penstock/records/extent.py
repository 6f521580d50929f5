"""How far a run is, by its ledger, against what a configuration asks for.

Owns the number of steps that a configuration asks for, and whether they are done. Invariant: it agrees with the
trainer's tickets (`penstock.tickets`): a configuration of which all is done leads to no further step. Pure.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from penstock.contracts.ledger import DropRecord, Record, RunRecord, StepRecord


def expected_steps(num_draws: int, batch_size: int, max_steps: int) -> int:
    """Steps of the full run if no ticket is dropped; max_steps: 0 for no limit."""
    steps = math.ceil(num_draws / batch_size)
    return min(steps, max_steps) if max_steps else steps


@dataclass(frozen=True)
class Extent:
    """num_steps: committed ones. num_ended: tickets that were trained or dropped; each epoch has num_prompts."""

    num_prompts: int
    batch_size: int
    num_steps: int
    num_ended: int

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Extent | None":
        """By the records of a ledger; None if none of them is of the run, which says how many prompts it has."""
        run: RunRecord | None = None
        num_steps, ended = 0, set[int]()
        for record in records:
            if isinstance(record, RunRecord):
                run = run or record
            elif isinstance(record, StepRecord):
                num_steps += 1
                ended.update(record.tickets)
            elif isinstance(record, DropRecord):
                ended.add(record.ticket)
        return None if run is None else cls(run.dataset_length, run.batch_size, num_steps, len(ended))

    def planned_steps(self, epochs: int, max_steps: int) -> int:
        """Steps of a configuration with these limits, if no ticket is dropped."""
        return expected_steps(epochs * self.num_prompts, self.batch_size, max_steps)

    def is_done(self, epochs: int, max_steps: int) -> bool:
        """Whether a configuration with these limits leaves nothing to train."""
        return self.num_ended >= epochs * self.num_prompts or 0 < max_steps <= self.num_steps

    def longer(self, epochs: int, max_steps: int) -> dict[str, int]:
        """By key, limits that lead to about as many steps again; those that do not end the run stay as they are."""
        more = {}
        if 0 < max_steps <= self.num_steps:
            more["run.max_steps"] = 2 * self.num_steps
        if self.num_ended >= epochs * self.num_prompts:
            more["total_train_epochs"] = 2 * math.ceil(self.num_ended / self.num_prompts)
        return more

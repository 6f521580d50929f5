"""Ends a run whose evaluations have stopped to improve (`eval.patience`).

Owns the decision. It is made of the lines of evaluations that have ended, so a trainer that is killed before the ledger
names the decision makes it again. Invariant: once the ledger names it, no step is trained after it, in this life or a
later one, unless `eval.patience` is raised or 0 then. Evaluations end during later steps: the run ends after the step
that is the last one when the deciding result is there.
"""

import logging
from collections.abc import Awaitable, Callable, Iterable

from penstock.config import EvalSection
from penstock.contracts.ledger import EarlyStopRecord
from penstock.records.best import judged, patience_of
from penstock.records.figures import Line

log = logging.getLogger(__name__)


class EarlyStop:
    """The decision of one trainer.

    evaluations: the lines of those that have ended. num_steps: committed ones. record: names a decision in the ledger.
    """

    def __init__(
        self,
        section: EvalSection,
        evaluations: Callable[[], Iterable[Line]],
        num_steps: Callable[[], int],
        record: Callable[[EarlyStopRecord], Awaitable[None]],
    ) -> None:
        self._section = section
        self._evaluations = evaluations
        self._num_steps = num_steps
        self._record = record
        self._decided = False
        self._num_seen = 0

    def restore(self, record: EarlyStopRecord | None) -> None:
        """Take over the decision of an earlier life, if it was the end of the run and still holds."""
        if record is None or record.steps != self._num_steps() or not self._section.patience:
            return
        self._decided = self._section.patience <= record.patience
        if self._decided:
            log.warning("%s; raise eval.patience, or set it to 0, to train on", described(record))

    async def decided(self) -> bool:
        """Whether the run ends before its next step."""
        section = self._section
        if self._decided or not section.patience or not self._num_steps():
            return self._decided
        lines = list(self._evaluations())
        if len(lines) == self._num_seen:
            return False
        self._num_seen = len(lines)
        found = patience_of(judged(lines, section.best_set, section.best_metric), section.min_delta)
        if found is None or found.waited < section.patience:
            return False
        record = EarlyStopRecord(
            self._num_steps(),
            section.best_set,
            section.best_metric,
            found.best.value,
            found.best.steps,
            section.patience,
            section.min_delta,
        )
        await self._record(record)
        log.info("%s", described(record))
        self._decided = True
        return True


def described(record: EarlyStopRecord) -> str:
    """In words, for the log."""
    return (
        f"stopped early after {record.steps} steps: in {record.patience} evaluations the {record.metric} of "
        f"{record.set} did not exceed {record.best:.4g}, which it was after {record.best_steps} steps, by more than "
        f"{record.min_delta:g}"
    )

"""Ends a run before all of its steps: its task is solved, or its evaluations no longer improve (`eval.patience`).

Owns the decision. Invariant: once the ledger names it, no step is trained after it, in this life or a later one, unless
`eval.patience` is raised or 0 then, or `eval.success` is above what solved the task.

solved      the last 10 batches of tickets gave no gradient, since all of their completions were right: their rewards
            reach `eval.success`, none of them and no step had a higher one, and some step had a lower one. So a reward
            that is always the same never counts as solved: it may be a function that does not look at its completion.
patience    made of the lines of evaluations that have ended, so a trainer that is killed before the ledger names the
            decision makes it again. Evaluations end during later steps: the run ends after the step that is the last
            one when the deciding result is there.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from penstock.config import EvalSection
from penstock.contracts.ledger import EarlyStopRecord
from penstock.records.best import judged, patience_of
from penstock.records.early_stop import why_stopped_early
from penstock.records.figures import Line
from penstock.tickets import TicketBook

log = logging.getLogger(__name__)


class EarlyStop:
    """The decision of one trainer.

    evaluations: the lines of those that have ended. reward_range: the lowest and the highest reward of all steps; None
    if they had none. num_steps: committed ones. record: names a decision in the ledger.
    """

    def __init__(
        self,
        section: EvalSection,
        book: TicketBook,
        evaluations: Callable[[], Iterable[Line]],
        reward_range: Callable[[], tuple[float, float] | None],
        num_steps: Callable[[], int],
        record: Callable[[EarlyStopRecord], Awaitable[None]],
    ) -> None:
        self._section = section
        self._book = book
        self._evaluations = evaluations
        self._reward_range = reward_range
        self._num_steps = num_steps
        self._record = record
        self._decided = False
        self._num_seen = 0

    def restore(self, record: EarlyStopRecord | None) -> None:
        """Take over the decision of an earlier life, if it was the end of the run and still holds."""
        if record is None or record.steps != self._num_steps():
            return
        if record.solved_tickets:
            # With a higher eval.success the same groups would end the run as a failure.
            holds = self._section.success <= record.best
            advice = "begin a run with final/ as actor.path and harder prompts"
        else:
            holds = 0 < self._section.patience <= record.patience
            advice = "raise eval.patience, or set it to 0"
        if holds:
            log.warning("%s; %s, to train on", described(record), advice)
            self._decide()

    async def decided(self) -> bool:
        """Whether the run ends before its next step. StallError if its rewards are always the same: not solved."""
        if self._decided:
            return True
        record = await self._solved() or self._impatient()
        if record is None:
            return False
        await self._record(record)
        log.info("%s", described(record))
        self._decide()
        return True

    def _decide(self) -> None:
        self._decided = True
        self._book.end()

    async def _solved(self) -> EarlyStopRecord | None:
        row = self._book.without_gradient
        lowest, highest, stall, steps = row.lowest, row.highest, row.error, self._num_steps()
        if lowest is None:
            return None
        seen = await asyncio.to_thread(self._reward_range)
        # Tickets of the row may be in no step yet, or never.
        if seen is None or not seen[0] < lowest >= max(highest, seen[1]):
            raise stall
        success = self._section.success
        return EarlyStopRecord(
            steps, metric="reward", best=lowest, best_steps=steps, solved_tickets=row.num_tickets, success=success
        )

    def _impatient(self) -> EarlyStopRecord | None:
        section = self._section
        if not section.patience or not self._num_steps():
            return None
        lines = list(self._evaluations())
        if len(lines) == self._num_seen:
            return None
        self._num_seen = len(lines)
        found = patience_of(judged(lines, section.best_set, section.best_metric), section.min_delta)
        if found is None or found.waited < section.patience:
            return None
        return EarlyStopRecord(
            self._num_steps(),
            section.best_set,
            section.best_metric,
            found.best.value,
            found.best.steps,
            section.patience,
            section.min_delta,
        )


def described(record: EarlyStopRecord) -> str:
    """In words, for the log."""
    return f"ended after {record.steps} steps, {why_stopped_early(msgspec.structs.asdict(record))}"

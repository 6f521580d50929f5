"""The checkpoint of the best evaluated weights, and those of evaluations that have not ended.

Owns the choice. Invariant: with `checkpoint.keep_best` the state after each evaluated step is written, and stays until
its evaluation has ended and another one is better; what was evaluated is exactly what it holds.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from penstock.config import EvalSection
from penstock.contracts.ledger import CheckpointRecord
from penstock.records.best import Judged, best_of, judged
from penstock.records.figures import Line


@dataclass(frozen=True)
class BestCheckpoint:
    """record: of the checkpoint; evaluation: of its weights."""

    record: CheckpointRecord
    evaluation: Judged


def best_checkpoint(
    committed: Iterable[CheckpointRecord], evaluations: Iterable[Line], section: EvalSection
) -> BestCheckpoint | None:
    """The best evaluated one of these; None if no evaluation is of weights that one of them holds.

    An evaluation during which weights changed is of none; nor is one before the first step, whose weights are those of
    `actor.path`.
    """
    records = {record.steps: record for record in committed}
    every = judged(evaluations, section.best_set, section.best_metric)
    best = best_of(every, lambda each: each.version is not None and each.steps in records and each.steps > 0)
    return None if best is None else BestCheckpoint(records[best.steps], best)


class KeepBest:
    """Names the checkpoints that stay beside the newest ones.

    evaluations: the lines of those that have ended. waiting: the steps after which others have begun and not ended.
    """

    def __init__(
        self,
        section: EvalSection,
        evaluations: Callable[[], Iterable[Line]],
        waiting: Callable[[], set[int]],
    ) -> None:
        self._section = section
        self._evaluations = evaluations
        self._waiting = waiting

    def names(self, committed: Sequence[CheckpointRecord]) -> set[str]:
        """Of these, the best one and those whose evaluation has not ended."""
        waiting = self._waiting()
        kept = {record.name for record in committed if record.steps in waiting}
        best = best_checkpoint(committed, self._evaluations(), self._section)
        return kept if best is None else kept | {best.record.name}

"""When steps whose loss or gradient is not finite end the run.

Owns the count of such steps in a row. A single one changes no weights and may be due to its batch; if one follows the
other, the weights themselves are broken, and no later step can repair them.
"""

import logging

from penstock.errors import NonFiniteError
from penstock.records.step_numbers import number_of
from penstock_trainer.learner.update import StepResult

log = logging.getLogger(__name__)

ROW = 2  # a single one may be due to its batch


class NonFiniteSteps:
    """The steps in a row, up to the last one, whose loss or gradient is not finite."""

    def __init__(self, limit: int) -> None:
        """`limit`: optimizer.max_non_finite_steps."""
        self._limit = limit
        self._in_a_row = 0
        self._last = "reported by an earlier trainer of the run"

    def begin(self, in_a_row: int) -> None:
        """Go on after so many of them: a new life of the trainer has the same weights."""
        self._in_a_row = in_a_row

    def note(self, step: int, result: StepResult) -> None:
        """Count the step with this id; NonFiniteError if it is the last of `limit` in a row.

        One without a gradient proves nothing.
        """
        if result.is_finite:
            self._in_a_row = 0 if result.changed else self._in_a_row
            return
        self._in_a_row += 1
        figures = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}, learning rate {result.learning_rate:g}"
        self._last = f"step {number_of(step)}: {figures}"
        log.warning(
            "step %d is not finite (%s): number %d in a row; %d end the run",
            number_of(step),
            figures,
            self._in_a_row,
            self._limit,
        )
        if self._in_a_row >= self._limit:
            raise self._diverged(f"expected fewer in a row than optimizer.max_non_finite_steps {self._limit}")

    def finish(self) -> None:
        """At the end of the run; NonFiniteError if it ends in a row of them: no later step has shown better weights."""
        if self._in_a_row >= ROW:
            raise self._diverged("expected the run to end with a finite step")

    def _diverged(self, expected: str) -> NonFiniteError:
        return NonFiniteError(
            f"the last {self._in_a_row} steps had a loss or gradient that is not finite ({self._last}): "
            f"{expected}. The weights are broken: export a checkpoint from before that, and begin a new run from it "
            "with a lower optimizer.lr"
        )

"""Draws by the success rates seen so far: which prompt of its set a ticket draws.

Owns the estimates, and which outcomes count for which draw. Invariant: the prompt of ticket n is a function of the
seed, n, the sets, the keys of `data.curriculum` and the outcomes of the first k(n) steps in the ledger. Here k(n)
counts the steps whose last ticket is below n - delay_steps * B, so that neither time nor the number of lives of a
trainer matters. `penstock.tickets` issues n only once k(n) is certain.

    estimate    s = (a + 1) / (a + b + 2) of a prompt: the mean of Beta(1, 1) after a successes and b failures. With
                each new outcome a and b are first multiplied by `decay` (a discounted posterior, as in MoPPS,
                arXiv 2507.04632)
    weight      failure: 1 - s (prioritized sampling, Kimi k1.5, arXiv 2501.12599); learnability: s (1 - s)
                (sampling for learnability, Rutherford et al. 2024)
    draw        a prompt of the set that the order gives the ticket: with probability `uniform_share` any, else by
                weight. Draws with the same k take different prompts, until a set has no other.

An outcome counts all completions of a ticket that have a reward; successes are those with at least `success`. Tickets
that were dropped count too: with dynamic sampling they are the prompts that are solved, or hopeless.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from penstock.config import CurriculumSection
from penstock.contracts import ScoredGroup
from penstock.contracts.ledger import LedgerState, Outcome, StepRecord
from penstock.contracts.outcomes import rewards_of
from penstock.errors import DataError
from penstock.seeds import draw_numbers
from penstock_trainer.data.drawing.draw_order import DrawOrder
from penstock_trainer.data.drawing.weight_tree import WeightTree

SCALE = 2**20  # weights are whole numbers of this part, at least 1: sums are exact, and every prompt can be drawn
UNSEEN = (0.0, 0.0)


@dataclass(frozen=True)
class _Step:
    """The outcomes that a step ends: of its own tickets, and of those that were dropped before its last one."""

    end: int
    outcomes: tuple[Outcome, ...]


class Curriculum:
    """The draws of one run.

    curriculum.committed(record)      a step is in the ledger, after the drops before it
    curriculum.row(12)                the prompt of ticket 12
    """

    def __init__(self, order: DrawOrder, seed: int, section: CurriculumSection, batch_size: int) -> None:
        self._order = order
        self._seed = seed
        self._section = section
        self.delay = section.delay_steps * batch_size
        self._seen: dict[int, tuple[float, float]] = {}
        first = self._weight_of(0)  # of any prompt: nothing is counted yet
        self._trees = [WeightTree(array("q", [first]) * each.size) for each in order.sets]
        self._steps: deque[_Step] = deque()
        self._drops: dict[int, Outcome] = {}
        self._taken: list[tuple[int, int]] = []
        self._rows: dict[int, int] = {}
        self._next = 0

    def restore(self, steps: Iterable[StepRecord], drops: Mapping[int, Outcome], next_number: int) -> None:
        """Start from the ledger: draw all tickets below `next_number` again. DataError if one differs from its record.

        steps: all of them, in order. drops: the outcomes of dropped tickets.
        """
        self._drops = dict(drops)
        recorded = dict(drops)
        for step in steps:
            if len(step.outcomes) != len(step.tickets):
                raise DataError(
                    f"step {step.number} has {len(step.outcomes)} outcomes of its {len(step.tickets)} tickets in the "
                    "ledger: expected one each, from which later draws follow"
                )
            recorded |= dict(zip(step.tickets, step.outcomes, strict=True))
            self.committed(step)
        for number in range(next_number):
            drawn = self.row(number)
            if number in recorded and recorded[number].prompt != drawn:
                raise DataError(
                    f"ticket {number} draws prompt {drawn} (counted from 0), and the ledger records that it drew "
                    f"{recorded[number].prompt}: expected the same; the ledger is damaged, or the run is of a release "
                    "that draws otherwise"
                )

    def row(self, number: int) -> int:
        """The prompt of a ticket that has not ended before all that is counted, by its number over all sets."""
        while self._next <= number:
            self._count(self._next)
            self._rows[self._next] = self._draw(self._next)
            self._next += 1
        return self._rows[number]

    def outcome(self, number: int, group: ScoredGroup | None) -> Outcome:
        """The outcome of a ticket that ends now; `group`: what came of it, if anything."""
        values = [value for value in rewards_of(group) if value is not None] if group is not None else []
        return Outcome(self.row(number), sum(value >= self._section.success for value in values), len(values))

    def dropped(self, number: int, outcome: Outcome) -> None:
        """A ticket has ended without a step, in the ledger."""
        self._drops[number] = outcome

    def committed(self, step: StepRecord) -> None:
        """A step is in the ledger, and so are the drops of all tickets before its last one."""
        end = max(step.tickets) + 1
        ended = dict(zip(step.tickets, step.outcomes, strict=True))
        for number in [each for each in self._drops if each < end]:
            ended[number] = self._drops.pop(number)
        self._steps.append(_Step(end, tuple(ended[number] for number in sorted(ended))))

    def success_rate(self, row: int) -> float:
        """The estimate of a prompt's success rate from what is counted; 0.5 for one that was never drawn."""
        successes, failures = self._seen.get(row, UNSEEN)
        return (successes + 1) / (successes + failures + 2)

    def _count(self, number: int) -> None:
        """Count the steps that count for a ticket; what was drawn before them may be drawn again."""
        while self._steps and self._steps[0].end <= number - self.delay:
            step = self._steps.popleft()
            self._give_back(self._taken)
            self._taken = []
            for outcome in step.outcomes:
                self._observe(outcome)
            for ended in [each for each in self._rows if each < step.end]:
                del self._rows[ended]

    def _observe(self, outcome: Outcome) -> None:
        if not outcome.completions:
            return
        successes, failures = self._seen.get(outcome.prompt, UNSEEN)
        decay = self._section.decay
        self._seen[outcome.prompt] = (
            successes * decay + outcome.successes,
            failures * decay + (outcome.completions - outcome.successes),
        )
        chosen = self._order.set_with(outcome.prompt)
        self._trees[chosen].set(outcome.prompt - self._order.rows_of(chosen).start, self._weight_of(outcome.prompt))

    def _draw(self, number: int) -> int:
        chosen = self._order.set_of(number)
        tree, rows, numbers = self._trees[chosen], self._order.rows_of(chosen), draw_numbers(self._seed, number)
        if not tree.total:
            again = [each for each in self._taken if each[0] == chosen]
            self._give_back(again)
            self._taken = [each for each in self._taken if each[0] != chosen]
        if next(numbers) < self._section.uniform_share * 2**64:
            index = next(each for value in numbers if tree[each := value % len(rows)])
        else:
            index = tree.find(next(numbers) % tree.total)
        tree.set(index, 0)
        self._taken.append((chosen, index))
        return rows.start + index

    def _give_back(self, taken: Sequence[tuple[int, int]]) -> None:
        for chosen, index in taken:
            self._trees[chosen].set(index, self._weight_of(self._order.rows_of(chosen).start + index))

    def _weight_of(self, row: int) -> int:
        rate = self.success_rate(row)
        weight = 1 - rate if self._section.priority == "failure" else rate * (1 - rate)
        return max(1, round(weight * SCALE))


def outcomes_of(ledger: LedgerState) -> dict[int, Outcome]:
    """The outcomes of the dropped tickets of a ledger."""
    return {number: record.outcome for number, record in ledger.drops.items() if record.outcome is not None}

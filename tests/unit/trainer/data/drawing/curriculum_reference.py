"""The curriculum written down again from its definition: each draw from all outcomes before it, with lists and sums.

A run without a queue, too: the ticket book of the product, and outcomes that are a function of ticket and prompt.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random

import msgspec

from penstock.config import CurriculumSection
from penstock.contracts import DropReason
from penstock.contracts.ledger import Outcome, StepRecord
from penstock.seeds import draw_numbers
from penstock.tickets import TicketBook, TicketLimits, TicketState
from penstock_trainer.data.drawing.curriculum import SCALE, Curriculum
from penstock_trainer.data.drawing.draw_order import DrawOrder

OutcomeOf = Callable[[int, int], tuple[int, bool]]
"""Ticket and prompt -> successes of its 4 completions, and whether it is dropped."""


def reference_draw(
    number: int,
    order: DrawOrder,
    section: CurriculumSection,
    batch_size: int,
    steps: list[StepRecord],
    drops: Mapping[int, Outcome],
    drawn: Mapping[int, int],
    seed: int,
) -> int:
    """The prompt of a ticket from the records of the full run. drawn: the prompts of all tickets before it."""
    ends = [step.tickets[-1] + 1 for step in steps]

    def num_counted(ticket: int) -> int:
        return sum(end <= ticket - section.delay_steps * batch_size for end in ends)

    counted = num_counted(number)
    outcomes = dict(drops) | {n: each for step in steps for n, each in zip(step.tickets, step.outcomes, strict=True)}
    of_prompt: dict[int, list[Outcome]] = {}
    for ticket in range(ends[counted - 1] if counted else 0):
        of_prompt.setdefault(outcomes[ticket].prompt, []).append(outcomes[ticket])

    def weight(prompt: int) -> int:
        with_any = [each for each in of_prompt.get(prompt, []) if each.completions]
        successes = failures = 0.0
        for each in with_any:
            successes = successes * section.decay + each.successes
            failures = failures * section.decay + each.completions - each.successes
        rate = (successes + 1) / (successes + failures + 2)
        return max(1, round((1 - rate if section.priority == "failure" else rate * (1 - rate)) * SCALE))

    prompts = list(order.rows_of(order.set_of(number)))
    before = [n for n in range(number) if num_counted(n) == counted and order.set_of(n) == order.set_of(number)]
    taken = [drawn[n] for n in before]
    taken = taken[len(taken) - len(taken) % len(prompts) :]  # once all were drawn, all may be drawn again
    numbers = draw_numbers(seed, number)
    weights = [0 if prompt in taken else weight(prompt) for prompt in prompts]
    if next(numbers) < section.uniform_share * 2**64:
        return next(prompts[n % len(prompts)] for n in numbers if weights[n % len(prompts)])
    return prompts[bisect_right(list(accumulate(weights)), next(numbers) % sum(weights))]


@dataclass
class SimulatedRun:
    """A run whose groups arrive, and whose versions are announced, in an order that `chance` chooses."""

    order: DrawOrder
    section: CurriculumSection
    seed: int
    limits: TicketLimits
    outcome_of: OutcomeOf
    chance: Random
    restarts: float = 0.0
    steps: list[StepRecord] = field(default_factory=list)
    drops: dict[int, Outcome] = field(default_factory=dict)
    drawn: dict[int, int] = field(default_factory=dict)
    num_lives: int = 0
    most_outstanding: int = 0

    def run(self) -> None:
        """To its end, over several lives."""
        announced, issued = 0, 0
        while True:
            self.num_lives += 1
            book, curriculum = TicketBook(self.limits), self._curriculum()
            curriculum.restore(self.steps, self.drops, issued)
            ended = {n for step in self.steps for n in step.tickets} | set(self.drops)
            committed = {n: step.step for step in self.steps[announced:] for n in step.tickets}
            book.restore(issued, [n for n in range(issued) if n not in ended], len(self.steps), committed)
            while not book.finished:
                for number in book.issue():
                    self._note(number, curriculum)
                self.most_outstanding = max(self.most_outstanding, book.num_outstanding)
                waiting = [n for n, state in book.outstanding.items() if state is TicketState.WAITING]
                batch = book.next_batch()
                if announced < len(self.steps) and (self.chance.random() < 0.3 or not (waiting or batch)):
                    announced += 1
                    book.announce(announced)
                elif batch and (self.chance.random() < 0.5 or not waiting):
                    self._commit(batch, book, curriculum)
                elif waiting:
                    self._arrive(self.chance.choice(waiting), book, curriculum)
                issued = book.next_number
                if self.chance.random() < self.restarts:
                    break
            else:
                return

    def _curriculum(self) -> Curriculum:
        return Curriculum(self.order, self.seed, self.section, self.limits.batch_size)

    def _note(self, number: int, curriculum: Curriculum) -> None:
        row = curriculum.row(number)
        assert self.drawn.setdefault(number, row) == row

    def _arrive(self, number: int, book: TicketBook, curriculum: Curriculum) -> None:
        successes, is_dropped = self.outcome_of(number, curriculum.row(number))
        if is_dropped:
            outcome = Outcome(curriculum.row(number), successes, 4)
            self.drops[number] = outcome
            curriculum.dropped(number, outcome)
            book.drop(number, DropReason.DEGENERATE)
        else:
            book.arrive(number, has_gradient=True)

    def _commit(self, batch: list[int], book: TicketBook, curriculum: Curriculum) -> None:
        outcomes = tuple(Outcome(curriculum.row(n), self.outcome_of(n, curriculum.row(n))[0], 4) for n in batch)
        record = msgspec.structs.replace(StepRecord(len(self.steps), tuple(batch), "f", "d"), outcomes=outcomes)
        self.steps.append(record)
        curriculum.committed(record)
        book.commit(batch)

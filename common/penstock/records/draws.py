"""Whether the tickets of two runs draw the same prompts, by their ledgers alone.

Owns the comparison. Draws follow from what the first record of a ledger names: the prompts, the seed and how prompts
are drawn. With a curriculum they follow from the outcomes of earlier tickets, too, and the ledger has the prompt of
each ticket that has ended. Outcomes depend on what was sampled, which two runs do not share: draws may part later on.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from penstock.contracts.ledger import ArchivedRecord, DropRecord, Outcome, Record, RunRecord, StepRecord

NAMES = {
    **{"dataset_digest": "prompts", "dataset_length": "number of prompts", "seed": "run.seed"},
    **{"draws": "the way of drawing", "set_sizes": "sizes of the sets"},
}


@dataclass(frozen=True)
class Drawn:
    """What a ledger has of draws. outcomes: with a curriculum, by ticket, of those that have ended."""

    run: RunRecord
    outcomes: dict[int, Outcome] = field(default_factory=dict)


def drawn(ledger: Iterable[Record]) -> Drawn | None:
    """None if the run has no first record."""
    run: RunRecord | None = None
    outcomes: dict[int, Outcome] = {}
    for record in ledger:
        if isinstance(record, RunRecord | ArchivedRecord):
            run = run or (record.run if isinstance(record, ArchivedRecord) else record)
        elif isinstance(record, StepRecord):
            outcomes.update(zip(record.tickets, record.outcomes, strict=False))  # an older record has none
        elif isinstance(record, DropRecord) and record.outcome is not None:
            outcomes[record.ticket] = record.outcome
    return None if run is None else Drawn(run, outcomes)


def compared_draws(one: Drawn, other: Drawn) -> str:
    """In words, such as `all 96 tickets that have ended in both draw the same prompt`."""
    if unequal := [NAMES[name] for name in NAMES if getattr(one.run, name) != getattr(other.run, name)]:
        return f"not comparable: {', '.join(unequal)} differ"
    if "curriculum" not in one.run.draws:
        return "each ticket draws the same prompt in both: draws follow from the seed and the sets alone"
    both = sorted(one.outcomes.keys() & other.outcomes.keys())
    prompt = next((n for n in both if one.outcomes[n].prompt != other.outcomes[n].prompt), None)
    if prompt is None:
        return f"all {len(both)} tickets that have ended in both draw the same prompt"
    outcome = next(n for n in both if one.outcomes[n] != other.outcomes[n])
    pairs = [(one.outcomes[n].prompt, other.outcomes[n].prompt) for n in both]
    ends = list(accumulate(one.run.set_sizes.values()))
    same = sum(mine == theirs for mine, theirs in pairs)
    same_set = sum(bisect_right(ends, mine) == bisect_right(ends, theirs) for mine, theirs in pairs)
    sets = f" ({same_set} from the same set)" if ends else ""
    why = (
        f"outcomes, from which the curriculum draws, differ from ticket {outcome} on"
        if outcome < prompt
        else "though no outcome before it differs"
    )
    return (
        f"{same} of {len(both)} tickets that have ended in both draw the same prompt{sets}, and all before ticket "
        f"{prompt}: {why}"
    )

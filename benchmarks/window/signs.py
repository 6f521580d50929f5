"""Whether effective sample size or KL tells how a run will go, among runs of one objective and lag.

Owns a stratified rank correlation over the raw lines of the study, and its permutation test. Runs are only compared
with those of the same objective and lag: over all of them together, lag itself makes both the signs and the scores.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence

from benchmarks.baselines.lines import Line
from benchmarks.baselines.scores import final_score
from benchmarks.window.study import measured, present

FIRST = (10, 20, 30)  # steps whose median is the sign
EVERY = 10  # steps between two evaluations
NUM_PERMUTATIONS = 2000
SIGNS: dict[str, Callable[[Line], Sequence[float | None]]] = {
    "effective sample size": lambda line: line.effective_sample_size,
    "KL": lambda line: line.behaviour_kl,
}

Pairs = tuple[list[float], list[float]]


def ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the mean of theirs.

    >>> ranks([0.3, 0.1, 0.3])
    [1.5, 0.0, 1.5]
    """
    return [sum(each < value for each in values) + (values.count(value) - 1) / 2 for value in values]


def correlation(strata: Sequence[Pairs]) -> float:
    """Rank correlation within strata: that of the ranks minus their stratum's mean, over all strata."""
    products = signs = outcomes = 0.0
    for xs, ys in strata:
        for x, y in zip(_centred(xs), _centred(ys), strict=True):
            products, signs, outcomes = products + x * y, signs + x * x, outcomes + y * y
    return products / math.sqrt(signs * outcomes)


def chance(strata: Sequence[Pairs], seed: int = 0, num_permutations: int = NUM_PERMUTATIONS) -> float:
    """Share of permutations within the strata whose correlation is as far from 0."""
    rng = random.Random(seed)
    found = abs(correlation(strata)) - 1e-12  # less than any difference of two correlations; sums are in another order
    hits = sum(
        abs(correlation([(xs, rng.sample(ys, len(ys))) for xs, ys in strata])) >= found for _ in range(num_permutations)
    )
    return (hits + 1) / (num_permutations + 1)


def early(lines: Sequence[Line], sign: str, first: int) -> list[Pairs]:
    """The median of the first steps against the score at the end."""
    strata: dict[tuple[str, int], Pairs] = {}
    for run in lines:
        signs, outcomes = strata.setdefault((run.cell.objective, run.cell.lag), ([], []))
        signs.append(statistics.median(present(SIGNS[sign](run)[:first])))
        outcomes.append(final_score(run))
    return list(strata.values())


def next_change(lines: Sequence[Line], sign: str) -> list[Pairs]:
    """The median of the steps before an evaluation against the change until the next one; by evaluation."""
    strata: dict[tuple[str, int, int], Pairs] = {}
    for run in lines:
        for index, (before, after) in enumerate(itertools.pairwise(run.held_out[1:])):
            signs, outcomes = strata.setdefault((run.cell.objective, run.cell.lag, index), ([], []))
            signs.append(statistics.median(present(SIGNS[sign](run)[EVERY * index : EVERY * (index + 1)])))
            outcomes.append(after - before)
    return list(strata.values())


def table(num_permutations: int = NUM_PERMUTATIONS) -> Iterator[str]:
    """The correlations of all runs with a lag, and how often chance gives as much."""
    lines = [line for line in measured() if line.cell.lag]
    yield "| Sign | Steps of its median | Outcome | Rank correlation | By chance |"
    yield "| --- | --- | --- | --- | --- |"
    rows: list[tuple[str, str, str, Sequence[Pairs]]] = []
    for name in SIGNS:
        rows += [(name, f"the first {first}", "final score", early(lines, name, first)) for first in FIRST]
        rows += [(name, f"the {EVERY} before", "change until the next evaluation", next_change(lines, name))]
    for name, steps, outcome, strata in rows:
        share = chance(strata, num_permutations=num_permutations)
        yield f"| {name} | {steps} | {outcome} | {correlation(strata):.2f} | {share:.3f} |"


def _centred(values: Sequence[float]) -> list[float]:
    found = ranks(values)
    mean = statistics.fmean(found)
    return [each - mean for each in found]

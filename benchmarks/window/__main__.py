"""The window of tickets, simulated: which ticket starts first, and a staleness bound that moves.

Owns the tables. Seeded; each takes a few minutes:

    python -m benchmarks.window order
    python -m benchmarks.window bound
    python -m benchmarks.window signs    no simulation: do the signs that would move the bound tell in advance?
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.baselines.cells import LAGS
from benchmarks.window import signs
from benchmarks.window.controller import SIGNS, Controller, Signs
from benchmarks.window.lengths import CASES
from benchmarks.window.simulation import ORDERS, Case, Result, Simulation
from benchmarks.window.study import Study

RATIOS = (0.5, 1.0, 2.0)
SERVERS = (8, 64)  # which hold half a batch and four batches
BOUNDS = LAGS
OBJECTIVES = ("ppo", "gspo", "decoupled, recomputed", "tis")
MOVED = ("lognormal, half by prompt", "a few prompts always long")
GROWTHS = (1.0, 4.0)


def line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def spread(values: Sequence[float]) -> str:
    """Least, median and most."""
    return f"{min(values):.2f}, {statistics.median(values):.2f}, {max(values):.2f}"


def orders(seed: int, num_steps: int) -> Iterator[str]:
    """Steps per unit of time in each order, relative to those by number; over all ratios."""
    yield line(["Lengths", "Servers", "max_staleness", "Steps", "Gap", "Lag", *ORDERS[1:]])
    yield line(["---"] * (5 + len(ORDERS)))
    for name, num_servers, bound in itertools.product(CASES, SERVERS, BOUNDS):
        rates: list[list[float]] = []
        gaps: list[float] = []
        lags: list[float] = []
        for ratio in RATIOS:
            case = Case(CASES[name], num_servers, ratio, seed=seed, num_steps=num_steps)
            results = [Simulation(replace(case, order=order), bound).run() for order in ORDERS]
            assert all(each.batches == results[0].batches for each in results), "an order changed a batch"
            rates.append([each.rate for each in results])
            gaps.append(results[0].gap(ratio))
            lags.append(results[0].lag)
        columns = [[row[place] / row[0] for row in rates] for place in range(1, len(ORDERS))]
        first = spread([row[0] for row in rates])
        yield line([name, str(num_servers), str(bound), first, spread(gaps), spread(lags), *map(spread, columns)])


@dataclass
class Compared:
    """One objective on one number of servers, or on both: effective batches per unit of time, a list entry per case."""

    fixed: dict[int, list[float | None]] = field(default_factory=lambda: {bound: [] for bound in BOUNDS})
    """None: its effective sample size or KL is one that lowers bounds."""
    moved: list[float] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)
    lags: list[float] = field(default_factory=list)
    growths: list[float] = field(default_factory=list)

    def add(self, fixed: dict[int, Result], moved: Result, study: Study, its: Signs, growth: float) -> None:
        for bound, result in fixed.items():
            self.fixed[bound].append(effective(result, study) if study.allows(result.lags, its) else None)
        self.moved.append(effective(moved, study))
        self.bounds.append(statistics.fmean(moved.bounds))
        self.lags.append(moved.lag)
        self.growths.append(growth)

    def cells(self) -> list[str]:
        """Best single bound; the moved one against it, against the best of each case (by growth) and against 1."""
        always = {bound: [each for each in values if each is not None] for bound, values in self.fixed.items()}
        single = max(
            (bound for bound, values in always.items() if len(values) == len(self.moved)),
            key=lambda bound: math.fsum(map(math.log, always[bound])),
        )
        best = [max(filter(None, values)) for values in zip(*self.fixed.values(), strict=True)]
        to_best = [moved / each for moved, each in zip(self.moved, best, strict=True)]
        by_growth = [
            spread([each for each, its in zip(to_best, self.growths, strict=True) if its == growth])
            for growth in GROWTHS
        ]
        to_single = [moved / each for moved, each in zip(self.moved, always[single], strict=True)]
        return [
            spread(self.bounds),
            spread(self.lags),
            str(single),
            spread(to_single),
            f"{sum(each >= 1.1 for each in to_single)} of {len(to_single)}",
            *by_growth,
        ]


def effective(result: Result, study: Study) -> float:
    """Steps per unit of time, each counted by the effective sample size at its lag."""
    return result.rate * study.mean_size(result.lags)


def bounds(seed: int, num_steps: int) -> Iterator[str]:
    """A bound that moves between 0 and 8, against fixed ones."""
    compared = {key: Compared() for key in itertools.product(SIGNS, OBJECTIVES, (*SERVERS, None))}
    studies = {objective: Study(objective) for objective in OBJECTIVES}
    for name, growth, num_servers, ratio in itertools.product(MOVED, GROWTHS, SERVERS, RATIOS):
        lengths = replace(CASES[name], growth=growth)
        case = Case(lengths, num_servers, ratio, seed=seed, num_steps=num_steps)
        fixed = {bound: Simulation(case, bound).run() for bound in BOUNDS}
        for (label, its), (objective, study) in itertools.product(SIGNS.items(), studies.items()):
            moved = Simulation(case, Controller(its, first=1, largest=BOUNDS[-1]), study.sample).run()
            for key in (num_servers, None):
                compared[label, objective, key].add(fixed, moved, study, its, growth)
    head = ["Signs", "Objective", "Servers", "Bound", "Lag", "Best single", "To it", "1.1 or more"]
    yield line([*head, *(f"To the best of each case, growth {growth:g}" for growth in GROWTHS)])
    yield line(["---"] * (len(head) + len(GROWTHS)))
    for (label, objective, servers), each in compared.items():
        yield line([label, objective, str(servers or "both"), *each.cells()])


def main() -> None:
    parser = argparse.ArgumentParser(description="The window of tickets, simulated.")
    parser.add_argument("what", choices=("order", "bound", "signs"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    match arguments.what:
        case "order":
            lines = orders(arguments.seed, arguments.steps or 100)
        case "bound":
            lines = bounds(arguments.seed, arguments.steps or 300)
        case _:
            lines = signs.table()
    for each in lines:
        print(each, flush=True)


if __name__ == "__main__":
    main()

"""Lengths of completions, and what is expected of a prompt.

Owns the distributions. Invariant: a ticket has the same lengths in every run of a seed, whatever starts first.
"""

import math
import random
from dataclasses import dataclass
from functools import lru_cache

GROUP_SIZE = 8
LONGEST = 10.0  # mean lengths: what sampling.max_new_tokens is for


@dataclass(frozen=True)
class Lengths:
    """In mean lengths: a factor of the prompt times one of the completion.

    prompt, completion: sigma of a lognormal factor. few: share of prompts that are always LONGEST / 2 long. known:
    whether the expected length of a prompt is the mean of its completions in the epoch before; else it is that of
    another prompt, so noise. growth: lengths at the end of the run over those at its start.
    """

    prompt: float
    completion: float
    few: float = 0.0
    known: bool = True
    growth: float = 1.0

    def _factor(self, rng: random.Random) -> float:
        if rng.random() < self.few:
            return LONGEST / 2
        return rng.lognormvariate(-(self.prompt**2) / 2, self.prompt)

    def _length(self, rng: random.Random, factor: float) -> float:
        return min(LONGEST, factor * rng.lognormvariate(-(self.completion**2) / 2, self.completion))

    def draw(self, number: int, seed: int) -> tuple[tuple[float, ...], float]:
        """Lengths of a ticket's completions, without growth, and the expected length."""
        rng = random.Random(f"{seed} {number}")
        factor = self._factor(rng)
        lengths = tuple(self._length(rng, factor) for _ in range(GROUP_SIZE))
        before = factor if self.known else self._factor(rng)
        return lengths, math.fsum(self._length(rng, before) for _ in range(GROUP_SIZE)) / GROUP_SIZE


@lru_cache(maxsize=2**15)
def drawn(lengths: Lengths, number: int, seed: int) -> tuple[tuple[float, ...], float]:
    """`Lengths.draw`, kept for the next run."""
    return lengths.draw(number, seed)


CASES = {
    "lognormal, prompts alike": Lengths(prompt=0.0, completion=1.2),
    "lognormal, half by prompt": Lengths(prompt=0.85, completion=0.85),
    "lognormal, mostly by prompt": Lengths(prompt=1.1, completion=0.5),
    "a few prompts always long": Lengths(prompt=0.3, completion=0.3, few=0.05),
    "half by prompt, expected is noise": Lengths(prompt=0.85, completion=0.85, known=False),
}
"""The lognormal ones have the variance of `benchmarks.staleness_sim`: a sigma of 1.2."""

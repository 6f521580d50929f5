"""Figures of held-out prompts that were sampled several times: mean@k, pass@k, and their intervals.

Owns the definitions. Invariant: prompts are the unit, since the completions of one are not independent; a prompt
without any reward is in no figure. Pure.
"""

import math
from collections.abc import Sequence

Z95 = 1.959964  # of the normal distribution, for 95 % on both sides


def pass_at(num_samples: int, num_right: int, k: int) -> float:
    """The chance that one of k completions is right, from n of which c are: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of the paper on HumanEval (arXiv 2107.03374, equation 1). Needs k <= n.

    >>> pass_at(4, 1, 1), pass_at(4, 1, 2), pass_at(4, 0, 4)
    (0.25, 0.5, 0.0)
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def mean(shares: Sequence[float]) -> float | None:
    """None without any."""
    return math.fsum(shares) / len(shares) if shares else None


def interval(shares: Sequence[float]) -> dict[str, float]:
    """Of the mean of one share of [0, 1] per prompt: {"low": ..., "high": ...}, 95 %, over draws of such prompts.

    Wilson's interval: for shares of 0 or 1 the usual one, for others wider than needed, since their variance is at most
    m (1 - m) with m the mean. Unlike m +- 1.96 standard errors, it is never empty. Nothing without a prompt.
    """
    m, n = mean(shares), len(shares)
    if m is None:
        return {}
    centre = (m + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(max(m * (1 - m), 0.0) / n + Z95**2 / (4 * n**2))
    return {"low": max(centre - half, 0.0), "high": min(centre + half, 1.0)}


def pass_figures(counts: Sequence[tuple[int, int]], most: int) -> dict[str, dict[str, float]]:
    """pass@k for k of 1, 2, 4, ... and `most`, by k: value, low, high.

    counts: of each prompt (completions with a reward, of them right); one with fewer than k of them is in no pass@k.

    >>> pass_figures([(2, 1), (2, 0)], 2)["2"]["value"]
    0.5
    """
    figures = {}
    for k in sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most}):
        shares = [pass_at(num_samples, num_right, k) for num_samples, num_right in counts if num_samples >= k]
        if (value := mean(shares)) is not None:
            figures[str(k)] = {"value": value, **interval(shares)}
    return figures
